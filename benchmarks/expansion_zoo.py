"""Every expansion on every model of the zoo: applied with its proof, refused by a reason, failed.

    python benchmarks/expansion_zoo.py run [NAME ...] [--library transformers|timm] [--seconds 300] [--limit 60]
    python benchmarks/expansion_zoo.py report

`run` goes on where the last run stopped, on whatever machine: it keeps one line a model in
benchmarks/results/expansion.jsonl. Each model has a process of its own, and `--limit` seconds of processor time: what it
did not come to is late. transformers' models come in an order that samples them evenly, those with a head first, timm's
with the smallest images first. A cell of
`report` holds the largest relative error of outputs, state and gradients in exact arithmetic, in evaluation and training,
or `-` where the model has no such dimension.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewrite  # noqa: E402
from benchmarks.apart import apart  # noqa: E402
from rewrite.errors import RewriteError, first_line, named_line  # noqa: E402
from rewrite.pipeline.crash import VerificationError  # noqa: E402
from tests.models import zoo  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "expansion.jsonl"
STEPS = {
    "ffn": "expand{ffn=2x}",
    "heads": "expand{heads=2x}",
    "head_dim": "expand{head_dim=+4}",
    "value_dim": "expand{value_dim=+4}",
    "hidden": "expand{hidden=+8}",
    "layers": "expand{layers=+1}",
    "lemon": "expand{method=lemon hidden=+8 untie=true}",
    "clone": "expand{method=clone hidden=2x untie=true}",
    "channels": "expand{method=net2net channels=2x}",
    "deeper": "expand{method=net2net layers=+1}",
    "upcycle": "upcycle{experts=4}",
    "slice": "slice",
}
STRIDE = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--library", choices=("transformers", "timm"), default="transformers")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--limit", type=int, default=60)
    options = parser.parse_args()
    if options.action == "report":
        for library in ("transformers", "timm"):
            report(library)
    else:
        run(options.library, options.names, options.seconds, options.limit)


def ordered(library: str) -> list[zoo.Case]:
    """The models of a library; those without a head by strides, so that the first ones are spread over all."""
    if library == "timm":
        return [zoo.timm_case(name, size) for name, size in sorted(zoo.TIMM.values(), key=lambda pair: pair[1])]
    cases = zoo.transformers_cases()
    heads = [case for case in cases if ":" in case.name]
    others = [case for case in cases if ":" not in case.name]
    return [*heads, *(case for start in range(STRIDE) for case in others[start::STRIDE])]


def results() -> dict[str, dict[str, Any]]:
    """The last result of each model."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def made(rows: Sequence[dict[str, Any]]) -> str:
    """With which versions of torch rows were made, and from which day to which."""
    versions, days = ({row[key] for row in rows} for key in ("torch", "on"))
    return f"torch {', '.join(sorted(versions))}, {' to '.join(sorted({min(days), max(days)}))}"


# -------------------- running --------------------


def run(library: str, names: list[str], seconds: int, limit: int) -> None:
    """Run the models that have no result yet, or those named."""
    RESULTS.parent.mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    done, end = results(), time.monotonic() + seconds
    rewrite.capture(nn.Linear(2, 2), (torch.zeros(3, 2),))  # so that each child finds all that a capture imports
    for case in ordered(library):
        if case.name in names if names else case.name not in done:
            if time.monotonic() > end:
                break
            row = row_of(case, limit)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            failed = [f"{kind}: {value}" for kind, value in row["cells"].items() if value.startswith("failed")]
            late = sum(value == "late" for value in row["cells"].values())
            print(f"{case.name:34} {row['seconds']:6.1f} s  {late} late  {'; '.join(failed)}", flush=True)


def row_of(case: zoo.Case, limit: int) -> dict[str, Any]:
    """One model in a process of its own, which is ended after ``limit`` seconds of its processor time."""
    began = time.monotonic()
    found = dict(apart(functools.partial(cells, case), limit))
    return {
        "name": case.name,
        "library": case.library,
        "seconds": round(time.monotonic() - began, 1),
        "limit": limit,
        "on": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cells": {**dict.fromkeys(STEPS, "late"), **found},
    }


def cells(case: zoo.Case) -> Iterator[tuple[str, str]]:
    """What each expansion does on a model, as soon as it is known."""
    args, kwargs = case.inputs(2, 7)
    try:
        program = rewrite.capture(case.build(), args, kwargs)
    except Exception as error:  # a model that cannot be captured is another benchmark's
        yield from ((kind, f"not captured: {named_line(error)[:200]}") for kind in STEPS)
        return
    for kind, text in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield kind, cell(program, text, folder)


def cell(program: rewrite.Program, text: str, folder: str) -> str:
    """What one expansion does on one model: its error, or `-`, or why it did not."""
    try:
        record = rewrite.apply(program, text, crash_folder=folder).history[-1]
    except VerificationError as error:
        return f"failed: {first_line(error)[:300]}"
    except RewriteError as error:
        return f"refused: {without_names(first_line(error))}"
    except Exception as error:  # a fault of ours: it counts
        return f"failed: {named_line(error)[:300]}"
    if not record.changes:
        reasons = [without_names(f": {skip.reason}") for skip in record.skipped]
        return f"refused: {reasons[0]}" if reasons else "-"
    checks = [check for part in (record, *record.steps) if part.verification for check in part.verification.checks]
    details = [check.detail for check in checks if {"same", "formula"} & set(check.name.split(": "))]
    errors = [float(detail.split("parts, ")[1].split(";")[0]) for detail in details if "parts, " in detail]
    return f"{max(errors):.0e}"


def without_names(reason: str) -> str:
    """A reason without what is the model's own: its last part, places left out."""
    words = reason.partition("): ")[2] or reason.partition(": ")[2]
    kept = ("head_dim", "value_dim", "method=lemon", "untie=true")
    words = " ".join(
        word if word.startswith(kept) or not ("." in word.strip(".,:;") or "_" in word) else "..." for word in words.split()
    )
    return words[:120]


# -------------------- reporting --------------------


def report(library: str) -> None:
    """What became of each expansion, and the reasons."""
    rows = [row for row in results().values() if row["library"] == library]
    if not rows:
        return
    total = len(ordered(library))
    print(f"{library}: {len(rows)} of {total} models; {made(rows)}, ", end="")
    print(f"one thread; median {statistics.median(r['seconds'] for r in rows):.0f} s a model\n")
    print("| expansion | applied | worst error | refused | no such place | late | failed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, text in STEPS.items():
        found = [row["cells"][kind] for row in rows]
        errors = [float(value) for value in found if value[0].isdigit()]
        counts = [sum(v.startswith(word) for v in found) for word in ("refused", "-", "late", "failed")]
        worst = f"{max(errors):.0e}" if errors else ""
        print(f"| `{text}` | {len(errors)} | {worst} | {' | '.join(map(str, counts))} |")
    captured = sum(not row["cells"]["ffn"].startswith("not captured") for row in rows)
    print(f"\ncaptured: {captured} of {len(rows)}\n")
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for kind, row in itertools.product(STEPS, rows):
        value = row["cells"][kind]
        if value.startswith(("refused", "failed", "not captured")):
            reasons[f"{kind}, {value}"].append(row["name"])
    for reason, names in sorted(reasons.items(), key=lambda item: (item[0].partition(",")[0], -len(item[1]))):
        print(f"- {reason} ({len(names)}: {', '.join(names[:4])}{' ...' * (len(names) > 4)})")


if __name__ == "__main__":
    main()
