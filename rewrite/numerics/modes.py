"""Whether what was run depends on being in training or in evaluation: who asked for the mode while it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from rewrite.torch_private import _DropoutNd


@contextmanager
def mode_readers() -> Iterator[list[nn.Module]]:
    """The modules that read ``training`` within the context; where none does, the other mode computes the same.

    A dropout of rate 0 does not count: it is the identity in both modes.
    """
    readers: list[nn.Module] = []

    def read(module: Any) -> bool:
        if not (isinstance(module, _DropoutNd) and module.p == 0):
            readers.append(module)
        return bool(module.__dict__["training"])

    def write(module: Any, value: bool) -> None:
        module.__dict__["training"] = value

    before = vars(nn.Module).get("training")
    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield readers
    finally:
        if before is None:
            del nn.Module.training
        else:
            nn.Module.training = before
