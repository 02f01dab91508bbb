"""Every model type that transformers' AutoModel knows: shrunk, fed with inferred inputs, captured, held against itself.

    python benchmarks/sweep.py run [TYPE ...] [--seconds 300] [--limit 45]
    python benchmarks/sweep.py report

`run` goes on where the last run stopped and keeps one line a type in build/sweep.jsonl; each type has a process of its
own, forked from one that has imported the libraries, and `--limit` seconds of processor time. The types come in one random
order, so that what a stopped run has covered is a sample of all. `report` prints the table of docs/compatibility.md. A type
counts as equal where the program's outputs in evaluation are the model's bit for bit, at the captured sizes, after one run
in both modes.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewrite  # noqa: E402
from benchmarks.apart import apart  # noqa: E402
from rewrite.sources.compat import mend_torchvision  # noqa: E402
from rewrite.sources.inputs import infer_inputs  # noqa: E402
from rewrite.torch_private import pytree  # noqa: E402
from tests.models import zoo  # noqa: E402

RESULTS = ROOT / "build" / "sweep.jsonl"
#: More parameters than this take too long for a sweep.
LARGEST = 300_000_000
EQUAL = "equal"
#: What becomes of a type, in the order of the table.
OUTCOMES = (EQUAL, "off", "refused", "fails", "draws", "inputs", "runs not", "builds not", "late")


class StepError(Exception):
    """A step before the capture did not work: (outcome, reason)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("types", nargs="*")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--limit", type=int, default=45)
    parser.add_argument("--part", default="1/1", help="which part of the types, so that several runs may share them")
    options = parser.parse_args()
    if options.action == "report":
        report()
    else:
        run(options.types or part(options.part), options.seconds, options.limit)


def known() -> list[str]:
    """The model types of AutoModel, in an order that says nothing about them."""
    mend_torchvision()
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return random.Random(0).sample(sorted(MODEL_MAPPING_NAMES), len(MODEL_MAPPING_NAMES))


def part(text: str) -> list[str]:
    """The types of part i of n, written i/n, that have no result yet."""
    number, count = map(int, text.split("/"))
    done = results()
    return [kind for kind in known()[number - 1 :: count] if kind not in done]


def results() -> dict[str, dict[str, Any]]:
    """The last result of each type."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["type"]: row for row in map(json.loads, lines)}


def run(types: list[str], seconds: int, limit: int) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    end = time.monotonic() + seconds
    warm_up()
    for kind in types:
        if time.monotonic() > end:
            break
        row = row_of(kind, limit)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{kind:34} {row['seconds']:6.1f} s  {row['outcome']:10} {row['reason']}", flush=True)


def warm_up() -> None:
    """Import what every child needs: the libraries, what a capture imports, and the model that most others borrow from."""
    torch.set_num_threads(1)  # before the fork: threads do not survive it
    one("llama")


def row_of(kind: str, limit: int) -> dict[str, Any]:
    """One type in a process of its own, which is ended after ``limit`` seconds of its processor time."""
    began = time.monotonic()
    found = apart(lambda: [one(kind)], limit)
    row = found[0] if found else {"outcome": "late", "reason": f"more than {limit} s, or killed"}
    return {"type": kind, "seconds": round(time.monotonic() - began, 1), **row}


def one(kind: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        model = step("builds not", lambda: built(kind))
        inputs = step("inputs", lambda: infer_inputs(model))
        step("runs not", lambda: evaluated(model, inputs))
        try_training(model, inputs)
        expected = evaluated(model, inputs)
        if compared(expected, evaluated(model, inputs)):
            return {"outcome": "draws", "reason": "two runs in evaluation differ"}
        program = step("refused", lambda: rewrite.capture(model, *inputs))
        found = step("fails", lambda: evaluated(program.module, inputs))
    except StepError as error:
        outcome, reason = error.args
        return {"outcome": outcome, "reason": reason}
    gap = compared(expected, found)
    return {"outcome": "off" if gap else EQUAL, "reason": gap, "notes": list(program.origin.notes)}


def step(outcome: str, action: Any) -> Any:
    try:
        return action()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise StepError(outcome, f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]) from error


def built(kind: str) -> nn.Module:
    """A small model of a type: the first of several ways to shrink its configuration by which it can be built."""
    from transformers import AutoModel

    errors = []
    for config in configurations(kind):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModel.from_config(config()).parameters())
            if size > LARGEST:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            return AutoModel.from_config(config()).train()
        except Exception as error:
            errors.append(error)
    raise errors[0]


def configurations(kind: str) -> list[Any]:
    """Ways to shrink a configuration: all sizes, those and what the zoo knows of the type, its depth alone, not at all."""
    from transformers import AutoConfig

    return [
        lambda: AutoConfig.for_model(kind, **zoo._small(AutoConfig.for_model(kind))),
        lambda: zoo.small_config(kind),
        lambda: shallow(AutoConfig.for_model(kind)),
        lambda: AutoConfig.for_model(kind),
    ]


def shallow(config: Any) -> Any:
    """A configuration with two layers wherever it counts them."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shallow(value)
        elif type(value) is int and value > 2 and ("layers" in name or name in ("n_layer", "depth")):
            setattr(config, name, 2)
    return config


def try_training(model: nn.Module, inputs: Any) -> None:
    """Run once in training mode, as a user may have; where it does not run so, evaluation is all there is."""
    args, kwargs = inputs
    try:
        model.train()(*args, **without_cache(model, kwargs))
    except Exception:
        model.eval()


def evaluated(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = inputs
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model.eval()(*args, **without_cache(model, kwargs))
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"use_cache": False, **kwargs} if "use_cache" in inspect.signature(model.forward).parameters else kwargs


def compared(a: list[torch.Tensor], b: list[torch.Tensor]) -> str:
    """How two lists of outputs differ; empty where they are equal bit for bit."""
    if [tuple(t.shape) for t in a] != [tuple(t.shape) for t in b]:
        return f"{[tuple(t.shape) for t in b]} in place of {[tuple(t.shape) for t in a]}"[:200]
    gaps = [
        float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-30))
        for x, y in zip(a, b, strict=True)
        if x.numel() and not torch.equal(x.nan_to_num(), y.nan_to_num())
    ]
    return f"relative error {max(gaps):.1e}" if gaps else ""


def report() -> None:
    import transformers

    rows = results()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}: {len(rows)} of {len(known())} types.\n"
    )
    print("| outcome | types | which, and why |\n| --- | ---: | --- |")
    for outcome in OUTCOMES:
        chosen = [row for row in rows.values() if row["outcome"] == outcome]
        causes: dict[str, list[str]] = collections.defaultdict(list)
        for row in chosen:
            causes[row["reason"].replace("|", "/")].append(row["type"])
        text = "; ".join(f"{', '.join(names)}: {cause}" for cause, names in sorted(causes.items(), key=lambda c: -len(c[1])))
        print(f"| {outcome} | {len(chosen)} | {'' if outcome == EQUAL else text} |")


if __name__ == "__main__":
    main()
