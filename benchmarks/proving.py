"""How the proof of a pass grows with the layers of a model and with the number of edits: CPU seconds, parts, exponents.

    python benchmarks/proving.py [--layers 4 8 16 32] [--width 128] [--rounds 1]

A GPT of so many layers, with a head, is captured once a size. Each pass runs on all of it; the last row edits the norms of
so many layers of the largest model. What a pass takes with its proof, less what it takes without, is the proof; beside it
stand the parts that were held. The exponent e of seconds ~ layers^e is fitted by least squares in logarithms.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewrite  # noqa: E402
from examples.char_gpt import CharGPT  # noqa: E402

PASSES = ("dyt", "rmsnorm", "rmsnorm{compressed=true}", "fold-affine", "rmsnorm,expand{hidden=+64}", "expand{layers=2x}")
WORDS, LENGTH = 65, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.strftime('%Y-%m-%d')}, width "
        f"{options.width}, {options.rounds} rounds; CPU seconds of the proof, in brackets the parts held\n"
    )
    programs = {count: program(count, options.width) for count in options.layers}
    print(f"| layers | {' | '.join(map(str, options.layers))} | exponent |")
    print(f"| --- {'| --- ' * len(options.layers)}| --- |")
    for text in PASSES:
        print(row(text, [(text, programs[count]) for count in options.layers], options.layers, options.rounds), flush=True)
    largest = options.layers[-1]
    steps = [
        ("dyt{where=" + "|".join(f"blocks.{i}.*" for i in range(count)) + "}", programs[largest]) for count in options.layers
    ]
    print(row(f"dyt, edits in so many layers of {largest}", steps, options.layers, options.rounds))


def program(layers: int, width: int) -> rewrite.Program:
    """A captured GPT on random characters."""
    torch.manual_seed(0)
    model = CharGPT(WORDS, LENGTH, width, layers)
    return rewrite.capture(model, (torch.randint(WORDS, (2, LENGTH)),))


def row(name: str, runs: Sequence[tuple[str, rewrite.Program]], sizes: Sequence[int], rounds: int) -> str:
    """One row of the table: each size's proof, and the exponent."""
    found = [measured(text, before, rounds) for text, before in runs]
    points = [(math.log(size), math.log(seconds)) for size, (seconds, _) in zip(sizes, found, strict=True)]
    cells = (f"{seconds:.2f} ({parts})" for seconds, parts in found)
    return f"| `{name}` | {' | '.join(cells)} | {slope(points):.2f} |"


def measured(text: str, before: rewrite.Program, rounds: int) -> tuple[float, int]:
    """CPU seconds of the proof of the last pass of a pipeline, by difference to a run without it, and its parts."""
    *earlier, last = text.split(",")
    start = rewrite.apply(before, ",".join(earlier)) if earlier else before
    seconds = []
    for _ in range(rounds):
        bare, _ = timed(last, start, verify=False)
        whole, after = timed(last, start, verify=True)
        seconds.append(whole - bare)
    checks = [c for record in after.history for c in (record.verification.checks if record.verification else ())]
    counts = [c.detail.split(" parts")[0].split()[-1] for c in checks if " parts" in c.detail]
    return statistics.median(seconds), int(counts[-2] if len(counts) > 1 else counts[-1])


def timed(text: str, before: rewrite.Program, *, verify: bool) -> tuple[float, rewrite.Program]:
    """CPU seconds of a pass, and its result."""
    began = time.process_time()
    after = rewrite.apply(before, text, verify=verify)
    return time.process_time() - began, after


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through some points, by least squares."""
    if len(points) < 2:
        return math.nan
    x, y = (statistics.fmean(p[i] for p in points) for i in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


if __name__ == "__main__":
    main()
