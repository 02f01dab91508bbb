"""`pytest --fast`: what is tried on every version of torch and of the libraries, in minutes of one core.

Left out are the table of every model on every backend, the fuzzer, random models and packaging; all but two models of each
pass in the kit's table (the cheapest that it changes and the cheapest that it leaves as it is), with their Inductor runs;
the development models but `MODELS`; and all but the first two cases of every test, save those of `WHOLE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import pytest

from .models import zoo
from .passes.table import Row, cheapest

#: An encoder, and convolutions with batch norms; the passes are tried on decoders.
MODELS = ("resnet18", "bert")
CASES = 2
FILES = (
    "backends/test_zoo.py",
    "hostile/test_fuzz.py",
    "frontend/test_random_models.py",
    "rewrite/test_packaging.py",
    "tests/test_public_api.py",
)
#: Whose every case is run.
WHOLE = ("frontend/test_capture.py", "rewrite/test_torch_private.py")


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests that are none of the fast ones."""
    seen: Counter[Hashable] = Counter()
    return [item for item in items if _is_slow(item, seen)]


def _is_slow(item: pytest.Item, seen: Counter[Hashable]) -> bool:
    path, given = item.path.as_posix(), _parameters(item)
    row, name = given.get("row"), given.get("name")
    if path.endswith(FILES):
        return True
    if isinstance(row, Row):
        return row not in cheapest()
    if name in zoo.DEVELOPMENT:
        return name not in MODELS
    if not given or path.endswith(WHOLE):
        return False
    test = path, getattr(item, "originalname", item.name)
    seen[test] += 1
    return seen[test] > CASES


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
