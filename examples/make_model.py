"""Write a model to a file as a user would: a timm model with random weights, saved whole by plain torch.save.

python examples/make_model.py [NAME] [-o model.pt]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rewrite.sources.compat import mend_torchvision


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
    mend_torchvision()  # timm imports torchvision, which beside a CPU build of torch may be broken
    import timm

    torch.manual_seed(seed)
    return timm.create_model(name)


if __name__ == "__main__":
    main()
