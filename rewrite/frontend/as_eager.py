"""Tracing a model's code along the path that it takes when it runs eagerly.

Libraries take another path when they see themselves compiled or exported: transformers then builds explicit masks and
repeats keys where eager attention is causal and grouped. The function is the same, the kernels, their rounding and their
speed are not the user's.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from rewrite.torch_private import FakeTensor, fake_tensors


class View(enum.Enum):
    """What the model's code sees of being traced."""

    EAGER = "an eager run on ordinary tensors"
    FAKE = "an eager run on fake tensors"
    TRACED = "the trace"


def _no() -> bool:
    """Answer in the place of torch; a Mock would, too, and take a tenth of a small model's capture for it."""
    return False


class _OrdinaryTensor:
    """What code outside of torch finds where FakeTensor was: no tensor is an instance of it."""


@contextlib.contextmanager
def seen_as(view: View) -> Iterator[None]:
    """Let library code that asks whether it is compiled, exported or given fake tensors see ``view``; torch sees all."""
    with contextlib.ExitStack() as stack:
        for name in ("is_compiling", "is_exporting") if view is not View.TRACED else ():
            stack.enter_context(mock.patch.object(torch.compiler, name, _no))
        if view is View.EAGER:
            stack.enter_context(_hidden_fakes())
        yield


@contextlib.contextmanager
def _hidden_fakes() -> Iterator[None]:
    package = fake_tensors

    def find(name: str) -> Any:
        if name != "FakeTensor":
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        return FakeTensor if caller.partition(".")[0] == "torch" else _OrdinaryTensor

    with mock.patch.object(package, "FakeTensor"), mock.patch.object(package, "__getattr__", find, create=True):
        del package.FakeTensor  # from here on find() answers; the outer patch puts it back
        yield
