"""The largest batch that a step of training fits on a GPU, and the time of a step, in each way of training.

    python benchmarks/largest_batch.py [--model gpt2|llama|vit|bert] [--limit 8GiB] [--passes TEXT;TEXT] [--device cuda]

Models are those of memory.py at the sizes given (12 blocks of width 768 unless said), in bfloat16, without an
optimizer. The allocator is limited to `--limit`, so that the search ends soon and no other process is in the way; the
batch grows by half until a step runs out of memory, then the gap is halved to 2 %. Times are of a step at the largest batch
that the compiled model fits, medians of 10, so that all do the same work. On a CPU it tries itself out at batches up to 4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import memory
import torch
from torch import nn

import rewrite
from rewrite import Program
from rewrite.torch_private import compiled_within, pytree
from rewrite.training.baselines import checkpointed_blocks

PASSES = (
    "compress-activations",
    "compress-activations{bits=4}",
    "share-norm,few-bit,compress-activations",
    "recompute",
    "fit-memory{budget=0.25}",
)
UNITS = {"GiB": 2**30, "MiB": 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--limit", default="8GiB")
    parser.add_argument("--passes", default=";".join(PASSES))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    memory.WIDTH, memory.LAYERS, memory.TOKENS = options.width, options.layers, options.tokens
    memory.HEADS, memory.BATCH = max(options.width // 64, 1), 2
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("there is no GPU (--device cpu tries the script out)")
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(int(options.limit[:-3]) * UNITS[options.limit[-3:]] / whole, 1.0))
    model, inputs = memory.made(options.model)
    model = model.to(options.device, torch.bfloat16).eval()
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: _home(t, options.device), inputs)
    program = rewrite.capture(model, (), inputs)
    print(f"torch {torch.__version__}, {_name(options.device)}, {options.model}, {options.limit}, {time.strftime('%F')}\n")
    print("| way | largest batch | times the compiled | ms a step | times the compiled |\n" + "| --- " * 5 + "|")
    rows = list(ways(program, options.passes.split(";")))
    ends = {name: largest(step(each, budget, options.device), inputs, options.device) for name, each, budget in rows}
    common = max(ends["torch.compile"], 1)
    times = {
        n: timed(step(each, budget, options.device), inputs, min(common, ends[n])) for n, each, budget in rows if ends[n]
    }
    for name, _, _ in rows:
        less = "" if ends[name] >= common else f" (at {ends[name]})"
        taken = times.get(name, 0.0)
        ratios = ends[name] / common, taken / max(times.get("torch.compile", 0.0), 1e-9)
        print(f"| {name} | {ends[name]} | {ratios[0]:.2f} | {1e3 * taken:.1f}{less} | {ratios[1]:.2f} |", flush=True)


def ways(program: Program, passes: list[str]) -> list[tuple[str, Program, float | None]]:
    """Each way's name, its program, and the budget that it is compiled within: None for eager mode."""
    found: list[tuple[str, Program, float | None]] = [
        ("eager", program, None),
        ("checkpoint per block", checkpointed_blocks(program), None),
        ("torch.compile", program, 1.0),
        ("torch.compile, budget 0.5", program, 0.5),
    ]
    for text in passes:
        try:
            after = rewrite.apply(program, text, verify=False)
        except rewrite.RewriteError as error:
            print(f"{text}: {error}", file=sys.stderr)
            continue
        found += [(f"`{text}`", after, None), (f"`{text}`, torch.compile", after, 1.0)]
        found.append((f"`{text}`, torch.compile, budget 0.5", after, 0.5))
    return found


def step(program: Program, budget: float | None, device: str) -> Callable[[dict[str, Any]], None]:
    """One forward and backward; compiled for any batch where there is a budget."""
    module: nn.Module = program.clone().module.train()
    torch.compiler.reset()
    call: Callable[..., Any] = module if budget is None else torch.compile(module, dynamic=True)

    def taken(inputs: dict[str, Any]) -> None:
        with compiled_within(1.0 if budget is None else budget):
            found = [t for t in pytree.tree_leaves(call(**inputs)) if isinstance(t, torch.Tensor) and t.requires_grad]
            torch.stack([t.float().square().mean() for t in found]).sum().backward()
        module.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return taken


def largest(run: Callable[[dict[str, Any]], None], inputs: dict[str, Any], device: str) -> int:
    """The largest batch that a step fits; 0 where not even 2 do."""
    fits, fails = 0, 0
    batch = 2
    while True:
        if tried(run, inputs, batch, device):
            fits = batch
            batch = max(batch * 3 // 2, batch + 1) if not fails else (fits + fails) // 2
        else:
            fails = batch
            batch = (fits + fails) // 2
        if (fails and fails - fits <= max(fails // 50, 1)) or (device == "cpu" and fits >= 3):
            return fits


def tried(run: Callable[[dict[str, Any]], None], inputs: dict[str, Any], batch: int, device: str) -> bool:
    """Whether a step of a batch runs within the memory that there is."""
    try:
        run(repeated(inputs, batch))
    except torch.OutOfMemoryError:
        return False
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return True


def timed(run: Callable[[dict[str, Any]], None], inputs: dict[str, Any], batch: int) -> float:
    """Seconds of a step, the median of 10 after the first two."""
    given, seconds = repeated(inputs, batch), []
    for _ in range(12):
        began = time.perf_counter()
        run(given)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def repeated(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """The inputs with as many samples."""
    return {name: t.repeat(-(-batch // len(t)), *[1] * (t.dim() - 1))[:batch].clone() for name, t in inputs.items()}


def _home(tensor: torch.Tensor, device: str) -> torch.Tensor:
    return tensor.to(device, torch.bfloat16) if tensor.is_floating_point() else tensor.to(device)


def _name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else device


if __name__ == "__main__":
    main()
