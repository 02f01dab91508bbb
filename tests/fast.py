"""`pytest --fast`: what is tried on every version of torch and of the libraries, in minutes of one core.

Left out are the table of every model on every backend, the fuzzer, all but two models of each pass in the kit's table (the
cheapest that it changes and the cheapest that it leaves as it is) with their Inductor runs, and the development models but
`MODELS` wherever a test is parametrized by model.
"""

from __future__ import annotations

import pytest

from .models import zoo
from .passes.table import Row, cheapest

#: An encoder, a decoder, and convolutions with batch norms; the stress models are tried too.
MODELS = ("resnet18", "bert", "llama")
FILES = ("backends/test_zoo.py", "hostile/test_fuzz.py")


def left_out(item: pytest.Item) -> bool:
    """Whether a test is none of the fast ones."""
    if item.path.as_posix().endswith(FILES):
        return True
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    row, name = given.get("row"), given.get("name")
    if isinstance(row, Row):
        return row not in cheapest()
    return name in zoo.DEVELOPMENT and name not in MODELS
