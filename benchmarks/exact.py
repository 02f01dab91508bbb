"""Exact passes on every model of the zoo: applied and proven, nothing to do, left alone with the reason, or failed.

    python benchmarks/exact.py timm --output exact-timm.jsonl
    python benchmarks/exact.py transformers --output exact-transformers.jsonl --passes rmsnorm fold-affine
    python benchmarks/exact.py timm swin_tiny_patch4_window7_224 --passes all --files     # every pass there is
    python benchmarks/exact.py report exact-timm.jsonl exact-transformers.jsonl     # the tables of docs/benchmarks.md

Each model writes one line to --output as soon as it is done; models that are there already are skipped. The figure is the
largest relative error that the proof found, in exact arithmetic, in outputs, state and gradients. With --files each result
is saved and loaded, and must give the same outputs.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import rewrite
from rewrite.errors import RewriteError, named_line
from rewrite.pipeline.registry import pass_names
from rewrite.torch_private import pytree
from tests.models import zoo

PASSES = (
    "rmsnorm",
    "rmsnorm{centering=keep}",
    "rmsnorm{compressed=true}",
    "layernorm",
    "fold-affine",
    "fold-batchnorm",
    "defer-norm",
    "norm-scaling",
    "layerscale",
    "gpas",
)
NEEDS = {
    "drop-attention": "drop-attention{layers=1}",
    "drop-ffn": "drop-ffn{layers=1}",
    "drop-blocks": "drop-blocks{layers=1}",
    "expand": "expand{ffn=2x}",
}
"""The texts of passes that do nothing without options."""
LATE = "not finished"
HELD = {"same", "same with other weights", "formula", "formula with other weights"}


class LateError(Exception):
    """A pass took longer than its limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["timm", "transformers", "report"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--passes", nargs="*", default=PASSES)
    parser.add_argument("--files", action="store_true", help="save and load each result, too")
    parser.add_argument("--limit", type=int, default=180, help="seconds that a pass may take")
    options = parser.parse_args()
    if options.what == "report":
        report([json.loads(line) for name in options.names for line in Path(name).read_text().splitlines()])
        return
    warnings.simplefilter("ignore")
    output = options.output or Path(f"exact-{options.what}.jsonl")
    done = {json.loads(line)["name"] for line in output.read_text().splitlines()} if output.exists() else set()
    for case in zoo.timm_cases() if options.what == "timm" else zoo.transformers_cases():
        if case.name not in done and (not options.names or case.name in options.names):
            passes = every_pass() if options.passes == ["all"] else options.passes
            result = tried(case, passes, options.limit, options.files)
            with output.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(case.name, {k: v["what"] for k, v in result.get("passes", {}).items()} or result["error"], flush=True)


def every_pass() -> list[str]:
    """Every pass by name, with options where it cannot do without."""
    return [NEEDS.get(name, name) for name in pass_names()]


def tried(case: zoo.Case, passes: list[str], limit: int, files: bool) -> dict[str, Any]:
    """Every pass on one model."""
    try:
        program = rewrite.capture(case.build(), *case.inputs(2, 12))
    except Exception as error:
        return {"name": case.name, "error": named_line(error, 220)}
    return {"name": case.name, "passes": {text: one(program, text, limit, files) for text in passes}}


def one(program: rewrite.Program, text: str, limit: int, files: bool) -> dict[str, Any]:
    """What a pass did: how many edits, the proof's error, the reasons of what was left alone."""
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    began = time.perf_counter()
    try:
        made = rewrite.apply(program, text)
        record = made.history[-1]
        if files and record.changed:
            reloaded(made)
    except rewrite.VerificationError as error:
        return {"what": "failed", "why": named_line(error, 300)}
    except RewriteError as error:
        return {"what": "refused", "reasons": [str(error)]}
    except LateError:
        return {"what": LATE}
    except Exception as error:
        return {"what": "failed", "why": named_line(error, 300)}
    finally:
        signal.alarm(0)
    checks = record.verification.checks if record.verification else ()
    errors = [check.error for check in checks if check.name in HELD and check.error is not None]
    reasons = [skip.reason for skip in record.skipped]
    what = "applied" if record.changed else "left alone" if reasons else "nothing there"
    seconds = round(time.perf_counter() - began, 1)
    return {"what": what, "edits": len(record.changes), "error": max(errors, default=None), "reasons": reasons, "s": seconds}


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


def report(found: list[dict[str, Any]]) -> None:
    """A row for each pass, and the reasons for which models were left alone."""
    seen = [each for each in found if "passes" in each]
    print(f"{len(seen)} models; not captured: {', '.join(e['name'] for e in found if 'error' in e) or 'none'}\n")
    print("| pass | applied | nothing there | left alone | not finished | failed | largest error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    names = list(dict.fromkeys(itertools.chain.from_iterable(each["passes"] for each in seen)))
    for name in names:
        results = [each["passes"][name] for each in seen if name in each["passes"]]
        count = collections.Counter(r["what"] for r in results)
        worst = max((r["error"] for r in results if r.get("error") is not None), default=0.0)
        left = count["left alone"] + count["refused"]
        cells = [count["applied"], count["nothing there"], left, count[LATE], count["failed"], f"{worst:.1e}"]
        print(f"| `{name}` | " + " | ".join(map(str, cells)) + " |")
    print("\n| pass | a reason why a model was left alone as a whole | models |\n| --- | --- | --- |")
    for name in names:
        reasons = collections.Counter(
            kind_of(each["passes"][name]["reasons"][0])
            for each in seen
            if each["passes"].get(name, {}).get("what") in ("left alone", "refused")
        )
        for reason, count_of in reasons.most_common(4):
            print(f"| `{name}` | {reason} | {count_of} |")
    for each in seen:
        for name, result in each["passes"].items():
            if result["what"] == "failed":
                print(f"failed: {name} on {each['name']}: {result['why']}")


def kind_of(reason: str) -> str:
    """A reason without the names of the model's own modules and its numbers."""
    return re.sub(r"\b\w+(\.\w+)+\b|\b\w*_\w+\b|\b\d+\b", "…", reason)


if __name__ == "__main__":
    main()
