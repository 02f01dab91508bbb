"""What `merge-linears` costs and gains: milliseconds for the edits alone, latency before and after, and the way back.

    python benchmarks/merging.py [--rounds 7] [--hidden 256] [--length 64] [--backends eager,inductor,onnxruntime]

Models of 12 blocks with random weights: a ViT (q, k, v) and a Llama (q, k, v; gate, up) of transformers. The edit is the
pass's `run` on a program whose shapes are known (the second run and later), in CPU time. Latency is that of one call, the
median over rounds that take turns, one thread. Without backends only the edits are measured.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

import rewrite
from rewrite.graph.edit import Editor
from rewrite.pipeline.context import Context
from rewrite.sources.compat import mend_torchvision

BATCHES = (1, 32)


def models(hidden: int, length: int) -> dict[str, tuple[torch.nn.Module, Callable[[int], dict[str, Any]]]]:
    """A ViT and a Llama of 12 blocks, each with the inputs for a batch."""
    mend_torchvision()
    from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

    size = {"hidden_size": hidden, "num_hidden_layers": 12, "num_attention_heads": hidden // 64}
    vit = ViTModel(ViTConfig(**size, intermediate_size=4 * hidden, image_size=16 * int(length**0.5)))
    llama = LlamaModel(LlamaConfig(**size, num_key_value_heads=hidden // 64, intermediate_size=3 * hidden, vocab_size=100))
    pixels = vit.config.image_size
    return {
        "ViT": (vit, lambda batch: {"pixel_values": torch.randn(batch, 3, pixels, pixels)}),
        "Llama": (llama, lambda batch: {"input_ids": torch.randint(0, 100, (batch, length))}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--backends", default="eager,inductor,onnxruntime")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}, hidden {options.hidden}, length {options.length}\n"
    )
    print("| model | layers merged | edit, ms | with proof, ms | split, ms | the same bytes | latency after over before |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, (model, inputs) in models(options.hidden, options.length).items():
        print(f"| {name} | {row(model, inputs, options)} |", flush=True)


def row(model: torch.nn.Module, inputs: Callable[[int], dict[str, Any]], options: argparse.Namespace) -> str:
    """One line of the table."""
    program = rewrite.capture(model, (), inputs(2))
    began = time.process_time()
    merged = rewrite.apply(program, "merge-linears")
    proven = time.process_time() - began
    back = rewrite.apply(merged, "split-linears", verify=False)
    old, new = program.module.state_dict(), back.module.state_dict()
    same = list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
    removed = sum(site.kind == "remove" for site in merged.history[0].changes)
    edits = [edit_time(p, step, options.rounds) for p, step in ((program, "merge-linears"), (merged, "split-linears"))]
    ratios = ", ".join(
        f"{backend} batch {batch}: {ratio(program, merged, backend, inputs(batch), options.rounds):.2f}"
        for backend in options.backends.split(",")
        if backend
        for batch in BATCHES
    )
    return f"{removed} | {edits[0]:.0f} | {1e3 * proven:.0f} | {edits[1]:.0f} | {'yes' if same else 'no'} | {ratios}"


def edit_time(program: rewrite.Program, name: str, rounds: int) -> float:
    """Milliseconds of a pass's `run` alone: the median."""
    step, times = rewrite.get_pass(name)(), []
    for _ in range(rounds):
        copy = program.clone(share=True)
        context = Context(Editor(copy, name))
        began = time.process_time()
        step.run(copy, context)
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times[1:])


def ratio(before: rewrite.Program, after: rewrite.Program, backend: str, inputs: dict[str, Any], rounds: int) -> float:
    """Latency after the pass over latency before it, both called in turns."""
    calls = [rewrite.lower(program, backend) for program in (before, after)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(3 * rounds):
            for call, taken in zip(calls, times, strict=True):
                began = time.perf_counter()
                call(**inputs)
                taken.append(time.perf_counter() - began)
    old, new = (statistics.median(taken[2:]) for taken in times)
    return new / old


if __name__ == "__main__":
    main()
