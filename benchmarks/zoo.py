"""The whole way for every model of the zoo, from capture over dyt and its proof to a training step of the result.

    python benchmarks/zoo.py timm            # one small model of every timm family, default configurations
    python benchmarks/zoo.py transformers    # transformers types, default flags, small sizes
    python benchmarks/zoo.py stress          # hand-written modules that break capture tools
    python benchmarks/zoo.py report a.jsonl b.jsonl ...   # the tables of docs/benchmarks.md

Each model writes one JSON line to --output as soon as it is done; models that are there already are skipped.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import rewrite
from rewrite.errors import named_line
from rewrite.numerics.compare import clone, relative_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
STEPS = ("capture", "eval", "train", "other size", "dyt", "save", "load", "graft", "step", "bfloat16", "double", "meta")
BATCH = 8
BEYOND = "the original cannot either"
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class LateError(Exception):
    """A model took longer than its limit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["timm", "transformers", "stress", "report", "fresh"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="seconds a model may take")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "report":
        report([Path(n) for n in options.names])
    elif options.what == "fresh":
        fresh(Path(options.names[0]))
    else:
        run_all(options.what, options.names, options.output or Path(f"zoo-{options.what}.jsonl"), options.limit)


def cases(what: str) -> list[Any]:
    if what == "stress":
        from tests.models.stress import stress_cases

        return list(stress_cases())
    from tests.models import zoo

    return list(zoo.timm_cases() if what == "timm" else zoo.transformers_cases())


def run_all(what: str, names: list[str], output: Path, limit: int) -> None:
    done = {json.loads(line)["name"] for line in output.read_text().splitlines()} if output.exists() else set()
    chosen = [c for c in cases(what) if (not names or c.name in names) and c.name not in done]
    chosen.sort(key=lambda c: names.index(c.name) if names else 0)
    for start in range(0, len(chosen), BATCH):
        with tempfile.TemporaryDirectory() as folder:
            results = {case.name: timed(case, what, Path(folder), limit) for case in chosen[start : start + BATCH]}
            load_elsewhere(Path(folder), results)
        with output.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results.values())
        for name, result in results.items():
            bad = {k: v for k, v in result["steps"].items() if v != "ok"}
            print(f"{name:40} {result['seconds']:6} s  {bad or 'ok'}", flush=True)


def timed(case: Any, what: str, folder: Path, limit: int) -> dict[str, Any]:
    began = time.perf_counter()
    home = folder / case.name.replace("/", "_")
    result = {"name": case.name, "library": what, **limited(lambda: one(case, home), limit)}
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def limited(action: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    def ring(*_: Any) -> None:
        raise LateError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        return action()
    except Exception as error:
        return {"steps": {"capture": words(error)}}
    finally:
        signal.alarm(0)


def one(case: Any, folder: Path) -> dict[str, Any]:
    """Every step for one model; a step that fails says why, later ones go on where they can."""
    torch.manual_seed(0)
    model = case.build()
    inputs = case.inputs(2, 12)
    steps: dict[str, str] = {}
    program = rewrite.capture(model, *inputs)
    steps["capture"] = "ok"
    facts = {
        "opaque": [str(o) for o in program.opaque],
        "notes": list(program.origin.notes),
        "nodes": len(program.graph.nodes),
        "capture_seconds": dict(program.origin.seconds),
    }
    attempt(steps, "eval", lambda: compare(model, program.module, inputs, training=False))
    attempt(steps, "train", lambda: compare(model, program.module, inputs, training=True))
    attempt(steps, "other size", lambda: compare(model, program.module, case.inputs(3, 20), training=False))
    for name, check in (("bfloat16", cast), ("double", doubled)):
        attempt(
            steps,
            name,
            lambda check=check: check(model, program.module, inputs),
            lambda check=check: check(model, model, inputs),
        )
    attempt(steps, "meta", lambda: moved(program.module, inputs), lambda: moved(model, inputs))
    found: dict[str, Any] = {}

    def dyt() -> str:
        found["new"] = rewrite.apply(program, "dyt")
        facts["sites"] = len(found["new"].history[-1].changes)
        facts["warnings"] = len(found["new"].history[-1].warnings)
        return "ok"

    attempt(steps, "dyt", dyt)
    if "new" in found:
        new = found["new"]
        saved(steps, new, inputs, folder)
        attempt(steps, "graft", lambda: grafted(new, case.build()))
        attempt(steps, "step", lambda: step(new, inputs))
    return {"steps": steps, **facts}


def attempt(steps: dict[str, str], name: str, action: Callable[[], str], original: Callable[[], str] = lambda: "ok") -> None:
    """Note how a step went; where it fails, whether it fails for the ``original`` too."""
    try:
        steps[name] = action()
    except LateError:
        raise
    except Exception as error:
        attempt(steps, name, original)
        steps[name] = words(error) if steps[name] == "ok" else f"{BEYOND} ({steps[name]})"


def words(error: BaseException) -> str:
    return named_line(error, 220)


def widen(inputs: Inputs) -> Inputs:
    found: Inputs = pytree.tree_map(
        lambda v: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
    )
    return found


def outcome(
    module: nn.Module, inputs: Inputs, training: bool, *, gradients: bool = True
) -> tuple[list[Any], dict[str, Any]]:
    """Outputs and gradients of a fixed function of them, from a copy, random layers seeded by the order of draws."""
    copied = clone(module).train(training)
    args, kwargs = copy.deepcopy(inputs)
    if "use_cache" in rewrite_signature(module):
        kwargs = {"use_cache": False, **kwargs}
    seed_everything()
    outputs = [t for t in pytree.tree_leaves(copied(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    loss = sum((o.double().sin().sum() for o in outputs if o.requires_grad and o.is_floating_point()), torch.zeros(()))
    named = {n: p for n, p in copied.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {}
    if gradients and loss.requires_grad:
        found = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    return [o.detach() for o in outputs], {**found, **{f"buffer {n}": b for n, b in copied.named_buffers()}}


def seed_everything() -> None:
    import random

    import numpy

    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def rewrite_signature(module: nn.Module) -> Any:
    import inspect

    return inspect.signature(module.forward).parameters


def compare(model: nn.Module, module: nn.Module, inputs: Inputs, *, training: bool) -> str:
    """Bit for bit; where not, the largest relative error."""
    a, grads_a = outcome(model, inputs, training)
    b, grads_b = outcome(module, inputs, training)
    if len(a) != len(b):
        return f"{len(b)} outputs instead of {len(a)}"
    worst = max((relative_error(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    gradient, where = 0.0, ""
    for name in grads_a.keys() & grads_b.keys():
        x, y = grads_a[name], grads_b[name]
        if x is None or y is None:
            error = 0.0 if all(t is None or not bool(t.any()) for t in (x, y)) else float("inf")
        else:
            error = relative_error(x, y)
        if error > gradient:
            gradient, where = error, name
    if worst == 0 and gradient == 0:
        return "ok"
    return f"relative error {worst:.1e}, of gradients and buffers {gradient:.1e} {where}"


def doubled(model: nn.Module, module: nn.Module, inputs: Inputs) -> str:
    return compare(clone(model).double(), clone(module).double(), widen(inputs), training=False)


def cast(model: nn.Module, module: nn.Module, inputs: Inputs) -> str:
    """In bfloat16: equal, or no further from the float64 model than 1.5 times what the original is."""
    narrow: Inputs = pytree.tree_map(
        lambda v: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, inputs
    )
    a, _ = outcome(clone(model).bfloat16(), narrow, False, gradients=False)
    b, _ = outcome(clone(module).bfloat16(), narrow, False, gradients=False)
    if all(x.dtype == y.dtype and relative_error(x, y) == 0 for x, y in zip(a, b, strict=True)):
        return "ok"
    exact, _ = outcome(clone(clone(model).bfloat16()).double(), widen(narrow), False, gradients=False)
    ratio = max(spread(y, e) / max(spread(x, e), 1e-12) for x, y, e in zip(a, b, exact, strict=True))
    return "ok" if ratio <= 1.5 else f"{ratio:.2f} times the original's error"


def spread(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def moved(module: nn.Module, inputs: Inputs) -> str:
    args, kwargs = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, inputs)
    clone(module).to("meta").eval()(*args, **kwargs)
    return "ok"


def saved(steps: dict[str, str], program: Any, inputs: Inputs, folder: Path) -> None:
    """Save with the outputs that a fresh process must reproduce."""
    folder.mkdir(parents=True)

    def save() -> str:
        rewrite.save(program, folder / "x.pt2")
        outputs, _ = outcome(program.module, inputs, False, gradients=False)
        torch.save((inputs, outputs), folder / "expected.pt")
        return "ok"

    attempt(steps, "save", save)


def load_elsewhere(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Load all that was saved in one fresh process, which has never seen the models."""
    subprocess.run([sys.executable, __file__, "fresh", str(folder)], check=False, capture_output=True)
    for name, result in results.items():
        answer = folder / name.replace("/", "_") / "answer"
        if result["steps"].get("save") == "ok":
            result["steps"]["load"] = answer.read_text() if answer.exists() else "the loading process died"


def fresh(folder: Path) -> None:
    """In a process of its own: the program and the plain export give the outputs that the writer saw."""
    for path in sorted(folder.glob("*/expected.pt")):
        steps: dict[str, str] = {}
        attempt(steps, "load", lambda path=path: reloaded(path.parent))
        (path.parent / "answer").write_text(steps["load"])


def reloaded(folder: Path) -> str:
    program = rewrite.load(folder / "x.pt2")
    inputs, expected = torch.load(folder / "expected.pt", weights_only=True)
    outputs, _ = outcome(program.module, inputs, False, gradients=False)
    args, kwargs = inputs
    plain = [
        t
        for t in pytree.tree_leaves(torch.export.load(folder / "x.pt2").module()(*args, **kwargs))
        if isinstance(t, torch.Tensor)
    ]
    gap = max((relative_error(x, y) for x, y in zip(expected, outputs, strict=True)), default=0.0)
    other = max((relative_error(x, y) for x, y in zip(expected, plain, strict=True)), default=0.0)
    ok = gap == 0 and other <= 1e-5 and len(program.history) == 1
    return "ok" if ok else f"program {gap:.1e}, torch.export.load {other:.1e}"


def grafted(program: Any, model: nn.Module) -> str:
    made = rewrite.graft(program, model)
    return "ok" if type(made) is type(model) else f"became a {type(made).__name__}"


def step(program: Any, inputs: Inputs) -> str:
    module = clone(program.module).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    outputs = [t for t in pytree.tree_leaves(module(*inputs[0], **inputs[1])) if isinstance(t, torch.Tensor)]
    loss: Any = sum(o.float().square().mean() for o in outputs if o.requires_grad)
    loss.backward()
    optimizer.step()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return "ok" if grads and all(bool(g.isfinite().all()) for g in grads) else "a gradient is missing or not finite"


def report(files: list[Path]) -> None:
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n")
    for library in dict.fromkeys(r["library"] for r in rows):
        chosen = [r for r in rows if r["library"] == library]
        print(f"### {library}: {len(chosen)} models\n")
        print("| step | as it should be | the original cannot either | otherwise |\n| --- | --- | --- | --- |")
        for name in STEPS:
            tried = [r["steps"][name] for r in chosen if name in r["steps"]]
            good, beyond = sum(v == "ok" for v in tried), sum(v.startswith(BEYOND) for v in tried)
            print(f"| {name} | {good} of {len(chosen)} | {beyond} | {len(tried) - good - beyond} |")
        whole = sum(
            all(r["steps"].get(s) == "ok" or r["steps"].get(s, "").startswith(BEYOND) for s in STEPS) for r in chosen
        )
        print(f"\nEvery step as it should be, where the original can: {whole} of {len(chosen)}.\n")
        causes: dict[str, list[str]] = collections.defaultdict(list)
        for row in chosen:
            for name, value in row["steps"].items():
                if value != "ok":
                    causes[f"{name}: {cause(value)}"].append(row["name"])
        for text, names in sorted(causes.items(), key=lambda item: -len(item[1])):
            print(f"- {text} ({len(names)}: {', '.join(sorted(names))})")
        print()


def cause(value: str) -> str:
    if value.startswith(BEYOND):
        return BEYOND
    if value.startswith("relative error") and " inf " in value:
        return "a buffer or a gradient is there on one side only, or of another shape"
    if value.startswith("relative error"):
        errors = [float(part) for part in value.replace(",", "").split() if part[0].isdigit()]
        return "rounding, relative error up to 1e-5" if max(errors) <= 1e-5 else "another result"
    return value[:110]


if __name__ == "__main__":
    main()
