"""What capture, lifting and a pass cost beside torch.export alone, how it grows with layers, and how fast --help is.

    python benchmarks/capture.py [--rounds 5]

Times are CPU seconds of this process, so that a busy machine does not distort them: medians over interleaved rounds,
ratios taken within a round. The check (the trace in evaluation mode and another dtype, and holding it against the
first) and verification are listed apart.
`rewrite --help` is wall time.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import rewrite
from rewrite.sources.compat import mend_torchvision

WALL = time.perf_counter
time.perf_counter = time.process_time  # type: ignore[assignment]  # the engine's own timings become CPU seconds too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}, {rounds} rounds\n"
    )
    overhead(rounds)
    growth(max(rounds // 2, 1))
    help_time(rounds)


def vit_tiny() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    mend_torchvision()
    import timm

    return timm.create_model("vit_tiny_patch16_224"), (torch.randn(2, 3, 224, 224),), {}


def llama(layers: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, vocab_size=128
    )
    return LlamaModel(config), (), {"input_ids": torch.randint(0, 128, (2, 16))}


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()  # what earlier actions left is not for this one to pay
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


def export_alone(model: nn.Module, args: Any, kwargs: Any) -> None:
    """torch.export as a user would call it, batch and length dynamic."""
    kwargs = {**kwargs, "use_cache": False} if "input_ids" in kwargs else kwargs
    shapes = torch.export.ShapesCollection()
    for tensor in [*args, *(v for v in kwargs.values() if isinstance(v, torch.Tensor))]:
        shapes[tensor] = dict.fromkeys(range(1 if tensor.dim() == 4 else tensor.dim()), Dim.AUTO)
    torch.export.export(model.train(), args, kwargs, dynamic_shapes=shapes, strict=False)


def one_round(build: Callable[[], Any]) -> dict[str, float]:
    model, args, kwargs = build()
    alone, _ = seconds(lambda: export_alone(model, args, kwargs))
    whole, program = seconds(lambda: rewrite.capture(model, args, kwargs))
    check = program.origin.seconds["check"]
    _, new = seconds(lambda: rewrite.apply(program, "dyt"))
    record = new.history[-1]
    return {
        "torch.export": alone,
        "capture": whole - check,
        "of it lift": program.origin.seconds["lift"],
        "dyt": record.seconds,
        "check trace": check,
        "verification": record.verification.seconds,
        "ratio": (whole - check + record.seconds) / alone,
    }


def overhead(rounds: int) -> None:
    print("| model | torch.export | capture | of it lift | dyt | ratio | check | verification |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, build in (("vit_tiny_patch16_224", vit_tiny), ("Llama, 12 layers", lambda: llama(12))):
        one_round(build)
        found = [one_round(build) for _ in range(rounds)]
        m = {key: statistics.median(r[key] for r in found) for key in found[0]}
        print(
            f"| {name} | {m['torch.export']:.2f} s | {m['capture']:.2f} s | {m['of it lift']:.2f} s | {m['dyt']:.2f} s "
            f"| {m['ratio']:.2f} | {m['check trace']:.2f} s | {m['verification']:.2f} s |",
            flush=True,
        )


def growth(rounds: int) -> None:
    print("\n| Llama layers | nodes | torch.export | lift | dyt | lift and dyt, ms a layer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layers in (2, 4, 8, 16, 32):
        rows = []
        for _ in range(rounds):
            model, args, kwargs = llama(layers)
            program = rewrite.capture(model, args, kwargs)
            new = rewrite.apply(program, "dyt", verify=False)
            rows.append((program.origin.seconds["export"], program.origin.seconds["lift"], new.history[-1].seconds))
        export, lift, dyt = (statistics.median(r[i] for r in rows) for i in range(3))
        print(
            f"| {layers} | {len(program.graph.nodes)} | {export:.2f} s | {lift:.3f} s | {dyt:.3f} s "
            f"| {1000 * (lift + dyt) / layers:.1f} |",
            flush=True,
        )


def help_time(rounds: int) -> None:
    command = [sys.executable, "-m", "rewrite", "--help"]
    found = []
    for _ in range(rounds + 1):
        began = WALL()
        subprocess.run(command, capture_output=True, check=True)
        found.append(WALL() - began)
    found = found[1:]
    print(f"\n`rewrite --help`: median {statistics.median(found):.2f} s, fastest {min(found):.2f} s")


if __name__ == "__main__":
    main()
