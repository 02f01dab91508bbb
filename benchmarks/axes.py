"""The axis analysis on the zoo: how many dimensions each model has, how long that takes, and whether primes fit everywhere.

    python benchmarks/axes.py [--library transformers|timm] [--seconds 300] [NAME ...]
    python benchmarks/axes.py --meta LAYERS

One line a model: nodes, named dimensions, how many of them can change, milliseconds of the analysis (processor time) and of
torch.export alone (by the clock), operators and layers without a rule, and the check: every resizable dimension at a prime
of its own, at once, all shapes inferred anew. `--meta`: a Llama with the sizes of 405B parameters (126 layers) on the meta
device, analyzed and grown.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewrite
from benchmarks.costs import LLAMA_405B
from rewrite.axes.analyze import analyze
from rewrite.axes.check import check
from rewrite.errors import RewriteError, first_line
from rewrite.graph.edit import Editor
from tests.models import zoo

GROW = "expand{ffn=2x heads=2x hidden=+1024}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--library", choices=("transformers", "timm"), default="transformers")
    parser.add_argument("--seconds", type=int, default=300, help="stop after so many")
    parser.add_argument("--meta", type=int, metavar="LAYERS")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.meta:
        return meta(options.meta)
    cases = zoo.transformers_cases() if options.library == "transformers" else zoo.timm_cases()
    chosen = [case for case in cases if not options.names or case.name in options.names]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.strftime('%Y-%m-%d')}\n")
    print("| model | nodes | dimensions | can change | ms | export, ms | no rule | primes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    began, times, exports, fits = time.monotonic(), [], [], []
    for case in chosen:
        if time.monotonic() - began > options.seconds:
            break
        try:
            milliseconds, exported, fitted = row(case)
        except Exception as error:  # a fault of ours: it counts, and the next model has its turn
            print(f"| {case.name} | | | | | | | {type(error).__name__}: {first_line(error)[:80]} |", flush=True)
            fits.append(False)
            continue
        times.append(milliseconds)
        exports.append(exported)
        fits.append(fitted)
    print(f"\n{len(fits)} of {len(chosen)} models; primes fit on {sum(fits)}; ", end="")
    print(f"median {statistics.median(times):.0f} ms, at most {max(times):.0f} ms; ", end="")
    print(f"torch.export alone {statistics.median(exports):.0f} ms, at most {max(exports):.0f} ms")


def row(case: zoo.Case) -> tuple[float, float, bool]:
    """Print one model's line: the milliseconds of the analysis and of torch.export, and whether primes fit."""
    args, kwargs = case.inputs(2, 7)
    program = rewrite.capture(case.build(), args, kwargs)
    began = time.process_time()
    table = analyze(program)
    milliseconds = 1000 * (time.process_time() - began)
    exported = 1000 * program.origin.seconds.get("export", 0.0)
    try:
        verdict, fitted = f"{check(Editor(program.clone(), 'check'))} fit", True
    except (RewriteError, RuntimeError) as error:
        verdict, fitted = first_line(error)[:90], False
    counts = (
        f"{len(program.graph.nodes)} | {len(table.named)} | {len(table.resizable)} | {milliseconds:.0f} | {exported:.0f}"
    )
    print(f"| {case.name} | {counts} | {', '.join(table.unknown)} | {verdict} |", flush=True)
    return milliseconds, exported, fitted


def meta(layers: int) -> None:
    """Analyze and grow a Llama of 405B's sizes on the meta device."""
    from rewrite.sources.compat import mend_torchvision

    mend_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA_405B)).train()
    began = time.process_time()
    program = rewrite.capture(model, (), {"input_ids": torch.randint(100, (2, 16))})
    captured, count = time.process_time() - began, sum(p.numel() for p in model.parameters()) / 1e9
    print(
        f"Llama of {layers} layers, {count:.0f}B parameters on the meta device, captured in {captured:.1f} s "
        f"(torch.export alone {program.origin.seconds.get('export', 0.0):.1f} s), {peak()} MiB",
        flush=True,
    )
    began = time.process_time()
    table = analyze(program)
    seconds = time.process_time() - began
    print(
        f"{len(program.graph.nodes)} nodes, {len(table.named)} dimensions, analyzed in {seconds:.1f} s, {peak()} MiB",
        flush=True,
    )
    began = time.process_time()
    grown = rewrite.apply(program, GROW, verify=False)
    count = sum(p.numel() for p in grown.module.parameters()) / 1e9
    print(f"`{GROW}` in {time.process_time() - began:.1f} s, {peak()} MiB: {count:.0f}B parameters")


def peak() -> int:
    """The most memory that this process had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
