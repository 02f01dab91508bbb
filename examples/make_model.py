"""Write a model to a file as a user would: a timm model with random weights, saved whole by plain torch.save.

python examples/make_model.py [NAME] [-o model.pt]
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch


def main() -> None:
    """Build the model and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="vit_tiny_patch16_224", help="a timm model name")
    parser.add_argument("-o", "--output", type=Path, default=Path("model.pt"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = build(options.name, options.seed)
    torch.save(model, options.output)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.output}: {options.name}, {count / 1e6:.2f} million parameters, random weights")


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A timm model in its default configuration, in training mode, with weights that depend on the seed alone."""
    library = _complete_torchvision()
    import timm

    del library
    torch.manual_seed(seed)
    return timm.create_model(name)


def _complete_torchvision() -> torch.library.Library | None:
    """timm imports torchvision, which beside a CPU build of torch misses two operators: define them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return None
    try:
        for extension in Path(spec.submodule_search_locations[0]).glob("_C.*"):
            torch.ops.load_library(str(extension))
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


if __name__ == "__main__":
    main()
