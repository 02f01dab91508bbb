"""What `apply` with its proof and `graft` cost: CPU seconds, and peak memory beside the model's own size.

    python benchmarks/applying.py [--rounds 3] [--model vit_base_patch16_224]

Each round is a process of its own, one thread: a timm model is captured, `dyt` is applied and proven, the result
is grafted onto the model. One forward and backward pass of the model in training is the unit. Peaks are those of the whole
process (`resource.getrusage`), over what it held once the model was built and captured, in sizes of the model.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

STEPS = ("capture", "forward and backward", "apply", "graft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--one", action="store_true", help="one round, its figures as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_round(options.model)))
        return
    command = [sys.executable, __file__, "--one", "--model", options.model]
    rounds = [
        json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout) for _ in range(options.rounds)
    ]
    found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}, {options.rounds} rounds, {options.model}, {found['size'] / 2**20:.0f} MiB\n"
    )
    print("| step | CPU seconds | in forward and backward passes | peak over the captured model, in sizes of the model |")
    print("| --- | --- | --- | --- |")
    for step in STEPS:
        passes = found[step] / found["forward and backward"]
        peak = f"{found[f'{step} peak'] / found['size']:.1f}" if f"{step} peak" in found else ""
        print(f"| {step} | {found[step]:.1f} | {passes:.1f} | {peak} |")


def one_round(name: str) -> dict[str, float]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import rewrite
    from rewrite.sources.compat import mend_torchvision

    mend_torchvision()
    import timm

    model = timm.create_model(name)
    x = torch.randn(2, *model.default_cfg["input_size"])
    found: dict[str, float] = {"size": sum(t.numel() * t.element_size() for t in model.parameters())}

    def timed(step: str, action: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = action()
        found[step] = time.process_time() - began
        return result

    program = timed("capture", lambda: rewrite.capture(model, (x,)))
    before = peak()
    result = timed("apply", lambda: rewrite.apply(program, "dyt"))
    found["apply peak"] = peak() - before
    timed("graft", lambda: rewrite.graft(result, model))
    found["graft peak"] = peak() - before
    model.train()
    timed("forward and backward", lambda: torch.autograd.grad(model(x).square().mean(), list(model.parameters())))
    return found


def peak() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
