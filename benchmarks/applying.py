"""What `apply` with its proof and `graft` cost: CPU seconds, and peak memory beside the model's own size.

    python benchmarks/applying.py [--rounds 3] [--step dyt] [--model vit_base_patch16_224 ...]

Each round is a process of its own, one thread: a model is captured, the pass is applied and proven, the result is grafted
onto the model and saved. The unit is one forward and backward pass of the model in training; beside it stand `torch.export`,
`torch.save` and `torch.load` of the same model. Peaks are those of the whole process (`resource.getrusage`), over what it
held once the model was built and captured, in sizes of the model. Models: any of timm, and those of `LANGUAGE`.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

STEPS = ("export", "save", "load", "capture", "forward and backward", "apply", "graft", "save the result")
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("BertModel", {}),
    "gpt2": ("GPT2Model", {}),
    "llama-300m": ("LlamaModel", {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}),
    "llama-1b": ("LlamaModel", {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20}),
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", nargs="+", default=["vit_base_patch16_224"])
    parser.add_argument("--step", default="dyt", help="the pass, as pipeline text")
    parser.add_argument("--one", action="store_true", help="one round of one model, its figures as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_round(options.model[0], options.step)))
        return
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}, {options.rounds} rounds, pass {options.step}; CPU seconds, in brackets forward and "
        "backward passes\n"
    )
    print(f"| model | {' | '.join(STEPS)} | all over export, load, save | apply peak | graft peak |")
    print(f"| --- {'| --- ' * len(STEPS)}| --- | --- | --- |")
    for name in options.model:
        print(row(name, options.step, options.rounds), flush=True)


def row(name: str, step: str, rounds: int) -> str:
    """One line of the table, of medians."""
    command = [sys.executable, __file__, "--one", "--model", name, "--step", step]
    found = [json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(rounds)]
    middle = {key: statistics.median(r[key] for r in found) for key in found[0]}
    unit, size = middle["forward and backward"], middle["size"]
    cells = [f"{middle[s]:.1f} ({middle[s] / unit:.1f})" if s == "apply" else f"{middle[s]:.1f}" for s in STEPS]
    whole = sum(middle[s] for s in ("capture", "apply", "graft", "save the result"))
    plain = sum(middle[s] for s in ("export", "load", "save"))
    peaks = [f"{middle[f'{s} peak'] / size:.1f}" for s in ("apply", "graft")]
    return f"| {name}, {size / 2**20:.0f} MiB | {' | '.join(cells)} | {whole / plain:.1f} | {' | '.join(peaks)} |"


def built(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model with its default initialization, and inputs for two samples."""
    from rewrite.sources.compat import mend_torchvision

    mend_torchvision()
    if name in LANGUAGE:
        import transformers

        kind, sizes = LANGUAGE[name]
        heads = HEADS if kind == "LlamaModel" else {}
        config = getattr(transformers, kind.replace("Model", "Config"))(use_cache=False, **sizes, **heads)
        return getattr(transformers, kind)(config), (torch.randint(1000, (2, 64)),)
    import timm

    model = timm.create_model(name)
    return model, (torch.randn(2, *model.default_cfg["input_size"]),)


def one_round(name: str, step: str) -> dict[str, float]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import rewrite

    model, inputs = built(name)
    found: dict[str, float] = {"size": sum(t.numel() * t.element_size() for t in model.parameters())}

    def timed(step: str, action: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = action()
        found[step] = time.process_time() - began
        return result

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.pt"
        timed("export", lambda: torch.export.export(model.train(), inputs, strict=False))
        timed("save", lambda: torch.save(model, place))
        timed("load", lambda: torch.load(place, weights_only=False))
        program = timed("capture", lambda: rewrite.capture(model, inputs))
        before = peak()
        result = timed("apply", lambda: rewrite.apply(program, step))
        found["apply peak"] = peak() - before
        grafted = timed("graft", lambda: rewrite.graft(result, model))
        found["graft peak"] = peak() - before
        timed("save the result", lambda: torch.save(grafted, place))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    timed("forward and backward", lambda: torch.autograd.grad(loss(model(*inputs)), parameters, allow_unused=True))
    return found


def loss(output: Any) -> torch.Tensor:
    """A number that follows from the first floating output."""
    first = output if isinstance(output, torch.Tensor) else next(iter(output.values()))
    return first.square().mean()


def peak() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
