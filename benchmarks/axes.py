"""The axis analysis on the zoo: how many dimensions each model has, how long that takes, and whether primes fit everywhere.

    python benchmarks/axes.py [--library transformers|timm] [--seconds 300] [NAME ...]

One line a model: nodes, named dimensions, how many of them can change, milliseconds of processor time, operators and layers
without a rule, and the check: every resizable dimension at a prime of its own, at once, all shapes inferred anew.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewrite
from rewrite.axes.analyze import analyze
from rewrite.axes.check import check
from rewrite.errors import RewriteError, first_line
from rewrite.graph.edit import Editor
from tests.models import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--library", choices=("transformers", "timm"), default="transformers")
    parser.add_argument("--seconds", type=int, default=300, help="stop after so many")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = zoo.transformers_cases() if options.library == "transformers" else zoo.timm_cases()
    chosen = [case for case in cases if not options.names or case.name in options.names]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.strftime('%Y-%m-%d')}\n")
    print("| model | nodes | dimensions | can change | ms | no rule | primes |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    began, times, fits = time.monotonic(), [], []
    for case in chosen:
        if time.monotonic() - began > options.seconds:
            break
        try:
            milliseconds, fitted = row(case)
        except Exception as error:  # a fault of ours: it counts, and the next model has its turn
            print(f"| {case.name} | | | | | | {type(error).__name__}: {first_line(error)[:80]} |", flush=True)
            milliseconds, fitted = 0.0, False
        times.append(milliseconds)
        fits.append(fitted)
    print(f"\n{len(fits)} of {len(chosen)} models; primes fit on {sum(fits)}; ", end="")
    print(f"median {statistics.median(times):.0f} ms, at most {max(times):.0f} ms")


def row(case: zoo.Case) -> tuple[float, bool]:
    """Print one model's line: its milliseconds, and whether primes fit."""
    args, kwargs = case.inputs(2, 7)
    program = rewrite.capture(case.build(), args, kwargs)
    began = time.process_time()
    table = analyze(program)
    milliseconds = 1000 * (time.process_time() - began)
    try:
        verdict, fitted = f"{check(Editor(program.clone(), 'check'))} fit", True
    except (RewriteError, RuntimeError) as error:
        verdict, fitted = first_line(error)[:90], False
    counts = f"{len(program.graph.nodes)} | {len(table.named)} | {len(table.resizable)} | {milliseconds:.0f}"
    print(f"| {case.name} | {counts} | {', '.join(table.unknown)} | {verdict} |", flush=True)
    return milliseconds, fitted


if __name__ == "__main__":
    main()
