"""Exact passes on every model of the zoo: applied and proven, nothing to do, left alone with the reason, or failed.

    python benchmarks/exact.py run [NAME ...] [--library timm|transformers] [--seconds 300]
    python benchmarks/exact.py run swin_tiny_patch4_window7_224 --passes all --files --output build/every.jsonl
    python benchmarks/exact.py report [FILE ...]        # the tables of docs/benchmarks.md

`run` goes on where the last run stopped, on whatever machine: it keeps one line a model in benchmarks/results/exact.jsonl,
the last one of a model counting. Each model has a process of its own and each pass `--limit` seconds of processor time. Of
a pipeline only the last pass is proven: those before it have rows of their own. The figure is the largest relative error
that the proof found, in exact arithmetic, in outputs, state and gradients. With --files each result is saved and loaded,
and must give the same outputs.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import itertools
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewrite  # noqa: E402
from benchmarks.apart import apart  # noqa: E402
from benchmarks.expansion_zoo import made, ordered  # noqa: E402
from rewrite.errors import RewriteError, named_line  # noqa: E402
from rewrite.pipeline.registry import as_passes, pass_names  # noqa: E402
from rewrite.torch_private import pytree  # noqa: E402
from tests.models import zoo  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "exact.jsonl"
PASSES = (
    "rmsnorm",
    "rmsnorm{centering=keep}",
    "rmsnorm{compressed=true}",
    "rmsnorm{centering=keep},layernorm",
    "fold-affine",
    "rmsnorm{centering=keep},fold-affine,defer-norm",
    "fold-batchnorm",
    "power-norm,merge-norms",
    "norm-scaling",
    "deepnorm",
    "layerscale",
    "gpas",
)
"""The passes that promise the same function; those that follow others, behind them."""
NEEDS = {
    "drop-attention": "drop-attention{layers=1}",
    "drop-ffn": "drop-ffn{layers=1}",
    "drop-blocks": "drop-blocks{layers=1}",
    "expand": "expand{ffn=2x}",
}
"""The texts of passes that do nothing without options."""
APPLIED, NOTHING, LEFT, LATE, FAILED = "applied", "nothing there", "left alone", "not finished", "failed"
HELD = {"same", "same with other weights", "formula", "formula with other weights"}


class LateError(Exception):
    """A pass took longer than its limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--library", choices=["timm", "transformers"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--passes", nargs="*", default=PASSES)
    parser.add_argument("--files", action="store_true", help="save and load each result, too")
    parser.add_argument("--limit", type=int, default=120, help="seconds that a pass may take")
    parser.add_argument("--seconds", type=int, default=300, help="begin no model after so many")
    options = parser.parse_args()
    if options.action == "report":
        report(results(map(Path, options.names or [RESULTS])))
        return
    passes = every_pass() if options.passes == ["all"] else options.passes
    run(options, passes)


def every_pass() -> list[str]:
    """Every pass by name, with options where it cannot do without."""
    return [NEEDS.get(name, name) for name in pass_names()]


def results(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The last row of each model; a pass that it was not tried with keeps its earlier result."""
    found: dict[str, dict[str, Any]] = {}
    for row in (json.loads(line) for path in files if path.exists() for line in path.read_text().splitlines()):
        earlier = found.get(row["name"], {}).get("passes", {})
        found[row["name"]] = {**row, "passes": {**earlier, **row.get("passes", {})}}
    return found


# -------------------- running --------------------


def run(options: argparse.Namespace, passes: list[str]) -> None:
    """Try the models that have no result yet, or those named."""
    warnings.simplefilter("ignore")
    options.output.parent.mkdir(exist_ok=True)
    end = time.monotonic() + options.seconds
    torch.set_num_threads(1)
    rewrite.capture(nn.Linear(2, 2), (torch.zeros(3, 2),))  # so that each child finds all that a capture imports
    libraries = [options.library] if options.library else ["transformers", "timm"]
    done = results([options.output])
    for case in itertools.chain.from_iterable(map(ordered, libraries)):
        missing = [text for text in passes if text not in done.get(case.name, {}).get("passes", {})]
        tried = (passes if case.name in options.names else []) if options.names else missing
        if not tried or time.monotonic() > end:
            continue
        row = one(case, tried, options)
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        cells = {text: cell["what"] for text, cell in row["passes"].items()}
        print(f"{case.name:34} {row['s']:6.1f} s  {cells or row['error']}", flush=True)


def one(case: zoo.Case, passes: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Every pass on one model, in a process of its own."""
    began = time.monotonic()
    found = dict(apart(functools.partial(cells, case, passes, options), 60 + options.limit * len(passes)))
    row = {"name": case.name, "library": case.library, "on": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    row["s"] = round(time.monotonic() - began, 1)
    if "error" in found:
        return {**row, "error": found["error"], "passes": {}}
    return {**row, "passes": {text: found.get(text, {"what": LATE}) for text in passes}}


def cells(case: zoo.Case, passes: list[str], options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """What each pass does, as soon as it is known."""
    try:
        program = rewrite.capture(case.build(), *case.inputs(2, 12))
    except Exception as error:
        yield "error", named_line(error, 220)
        return
    for text in passes:
        yield text, cell(program, text, options.limit, options.files)


def cell(program: rewrite.Program, text: str, limit: int, files: bool) -> dict[str, Any]:
    """What a pass did: how many edits, the proof's error, the reasons of what was left alone."""
    signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    began = time.process_time()
    try:
        found = tried(program, text, files)
    except rewrite.VerificationError as error:
        found = {"what": FAILED, "why": named_line(error, 300)}
    except RewriteError as error:
        found = {"what": LEFT, "reasons": [str(error)]}
    except LateError:
        found = {"what": LATE}
    except Exception as error:
        found = {"what": FAILED, "why": named_line(error, 300)}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return {**found, "s": round(time.process_time() - began, 1)}


def tried(program: rewrite.Program, text: str, files: bool) -> dict[str, Any]:
    """The last pass of a pipeline, proven."""
    *before, last = as_passes(text)
    with tempfile.TemporaryDirectory() as folder:
        made = rewrite.apply(
            rewrite.apply(program, list(before), verify=False) if before else program, [last], crash_folder=folder
        )
    record = made.history[-1]
    if files and record.changed:
        reloaded(made)
    checks = record.verification.checks if record.verification else ()
    errors = [check.error for check in checks if check.name in HELD and check.error is not None]
    reasons = [skip.reason for skip in record.skipped if skip.path]
    what = APPLIED if record.changed else LEFT if reasons else NOTHING
    return {"what": what, "edits": len(record.changes), "error": max(errors, default=None), "reasons": reasons[:2]}


def reloaded(program: rewrite.Program) -> None:
    """Raise where a program is another after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        again = rewrite.load(rewrite.save(program, Path(folder) / "made.pt2"))
    outputs = []
    for each in (program, again):
        args, kwargs = copy.deepcopy((program.example_args, dict(program.example_kwargs)))
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(pytree.tree_leaves(each.module.eval()(*args, **kwargs)))
    for old, new in zip(*outputs, strict=True):
        if isinstance(old, torch.Tensor) and not torch.equal(old, new) and not old.isnan().any():
            raise AssertionError("another one after a file")


def ring(*_: Any) -> None:
    raise LateError


# -------------------- reporting --------------------


def report(found: dict[str, dict[str, Any]]) -> None:
    """A row for each pass, the reasons for which models were left alone, and what failed."""
    seen = [row for row in found.values() if row["passes"]]
    if not seen:
        return
    counted = collections.Counter(row["library"] for row in seen)
    print(f"{made(seen)}: ", end="")
    print(", ".join(f"{count} {library}" for library, count in counted.items()), end="; not captured: ")
    print(", ".join(row["name"] for row in found.values() if not row["passes"]) or "none", end="\n\n")
    print(f"| pass | {APPLIED} | {NOTHING} | {LEFT} | {LATE} | {FAILED} | largest error |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    names = list(dict.fromkeys(name for row in seen for name in row["passes"]))
    by_pass = {name: [row["passes"][name] for row in seen if name in row["passes"]] for name in names}
    for name, results_ in by_pass.items():
        count = collections.Counter(r["what"] for r in results_)
        worst = max((r["error"] for r in results_ if r.get("error") is not None), default=0.0)
        print(f"| `{name}` | " + " | ".join(str(count[k]) for k in (APPLIED, NOTHING, LEFT, LATE, FAILED)), end="")
        print(f" | {worst:.1e} |" if count[APPLIED] else " | |")
    print("\n| pass | a reason why a model was left alone as a whole | models |\n| --- | --- | ---: |")
    for name, results_ in by_pass.items():
        reasons = collections.Counter(kind_of(r["reasons"][0]) for r in results_ if r["what"] == LEFT)
        for reason, many in reasons.most_common(4):
            print(f"| `{name}` | {reason} | {many} |")
    for row in seen:
        for name, result in row["passes"].items():
            if result["what"] in (FAILED, LATE):
                print(f"{result['what']}: {name} on {row['name']}: {result.get('why', '')}", file=sys.stderr)


def kind_of(reason: str) -> str:
    """A reason without the names of the model's own modules and its numbers."""
    return re.sub(r"\b\w+(\.\w+)+\b|\b\w*_\w+\b|\b\d+\b", "…", reason)


if __name__ == "__main__":
    main()
