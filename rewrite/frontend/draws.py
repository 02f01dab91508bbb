"""Numbers that a model draws outside of torch while it is traced: a trace holds those it drew, so they are noted."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy

_NOTE = "the model's code draws numbers with numpy or random while it runs: the program repeats the ones drawn at capture"


@contextlib.contextmanager
def foreign_draws(notes: list[str]) -> Iterator[None]:
    """Note draws from the generators of ``random`` and ``numpy.random``, and leave both as they were."""
    plain, arrays = random.getstate(), numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        drawn = random.getstate() != plain or repr(numpy.random.get_state(legacy=False)) != repr(arrays)
        if drawn and _NOTE not in notes:
            notes.append(_NOTE)
        random.setstate(plain)
        numpy.random.set_state(arrays)
