"""Pick the smallest model of every timm family: prints the table `TIMM` of tests/models/zoo.py.

    python benchmarks/pick_timm.py [FAMILY ...]

A family is a module of `timm.models`. Its variants are tried in the order of their parameter counts (taken on
the meta device) and the first one is kept that runs forward and backward, trained and evaluated, at batch 2
and 3. The input is the model's own size where its configuration fixes it, else the smallest of `SIZES` that runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from rewrite.errors import named_line
from tests.models.zoo import import_timm, leaves

SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 320)
MAX_PARAMETERS = 450_000_000
TRIES = 3


def families(timm: Any) -> dict[str, list[str]]:
    """Every family with the names registered in it."""
    return {family: timm.list_models(module=family) for family in timm.list_modules()}


def parameters(timm: Any, name: str) -> int:
    """Number of parameters, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def counts(timm: Any, names: list[str]) -> list[tuple[int, str]]:
    """(parameters, name), smallest first; what cannot be built on the meta device is named on stderr."""
    found = []
    for name in names:
        try:
            found.append((parameters(timm, name), name))
        except Exception as error:
            print(f"  {name}: not on meta: {type(error).__name__}: {error}", file=sys.stderr)
    return sorted(found)


def candidates(config: dict[str, Any]) -> tuple[int, ...]:
    """Input sizes worth trying for a model's `default_cfg`."""
    size = config["input_size"][-1]
    if config.get("fixed_input_size"):
        return (size,)
    least = config.get("min_input_size", (3, 0, 0))[-1]
    return (*(s for s in SIZES if least <= s < size), size)


def runs(model: torch.nn.Module, size: int) -> str | None:
    """None if the model runs at that size in both modes, else the error."""
    try:
        for batch in (2, 3):
            for mode in (True, False):
                outputs = leaves(model.train(mode)(torch.randn(batch, 3, size, size)))
                sum(output.float().sum() for output in outputs).backward()
    except Exception as error:
        return named_line(error, 120)
    return None


def pick(timm: Any, names: list[str]) -> tuple[str, int, int] | list[str]:
    """(name, input size, parameters) of the smallest variant that runs, or why none does."""
    errors = []
    for count, name in counts(timm, names)[:TRIES]:
        if count > MAX_PARAMETERS:
            errors.append(f"{name}: {count / 1e6:.0f}M parameters")
            continue
        torch.manual_seed(0)
        model = timm.create_model(name)
        for size in candidates(model.default_cfg):
            error = runs(model, size)
            if error is None:
                return name, size, count
        errors.append(f"{name}: {error}")
    return errors


def main(wanted: list[str]) -> None:
    timm = import_timm()
    for family, names in families(timm).items():
        if wanted and family not in wanted:
            continue
        start = time.perf_counter()
        picked = pick(timm, names)
        seconds = time.perf_counter() - start
        if isinstance(picked, tuple):
            name, size, count = picked
            print(f'    "{family}": ("{name}", {size}),', flush=True)
            print(f"  {family}: {name} at {size}, {count / 1e6:.2f}M, {seconds:.1f} s", file=sys.stderr)
        else:
            print(f"  {family}: NONE: {'; '.join(picked)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
