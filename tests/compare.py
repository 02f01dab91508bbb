"""Holding a captured program against its model, bit for bit: what the tests of the engine share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rewrite import Program, capture
from rewrite.testing.observe import Observed, bytes_of, differences, observe, outline, same, tensors, untouched

from .models import stress, zoo
from .models.zoo import Case

__all__ = ["Observed", "bytes_of", "differences", "observe", "outline", "same", "tensors", "untouched"]

#: The batch and length that every case is captured with, and another pair to call it with.
CAPTURED, OTHER = (2, 12), (3, 20)


@functools.cache
def case(name: str) -> Case:
    """The development or stress case of that name."""
    return next(c for c in [*zoo.development_cases(), *stress.stress_cases()] if c.name == name)


@dataclass(frozen=True)
class Capturing:
    """A model, what it was before it was captured, and its program. Neither may be run: tests call copies."""

    model: nn.Module
    tensors: Mapping[str, tuple[int, Tensor]]
    outline: list[Any]
    program: Program


@functools.cache
def capturing(name: str) -> Capturing:
    """A case captured once."""
    chosen = case(name)
    model = chosen.build()
    before, seen = bytes_of(model), outline(model)
    return Capturing(model, before, seen, capture(model, *chosen.inputs(*CAPTURED)))


def captured(name: str) -> Program:
    """The program of a case, captured once; tests call copies of it."""
    return capturing(name).program


@functools.cache
def _model(name: str) -> nn.Module:
    return case(name).build()


def model_of(name: str) -> nn.Module:
    """A fresh model of a case; the large ones are built once and copied."""
    return case(name).build() if case(name).library == "stress" else copy.deepcopy(_model(name))
