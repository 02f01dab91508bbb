"""Captures made once: `capture` remembers those of a worker, `shared` keeps those of the cases in files for all workers.

Tests of capture itself call `rewrite.capture`. Elsewhere a capture is where a test begins, not what it is about, and takes
most of its time.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

import rewrite
from rewrite import Program
from tests.compare import captured


@dataclass(frozen=True)
class Store:
    """What was captured: in this worker by its key, for all workers in files of a folder, if there is one."""

    folder: list[Path] = field(default_factory=list)
    kept: dict[str, tuple[Program, list[Tensor]]] = field(default_factory=dict)


STORE = Store()


def capture(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Program:
    """`rewrite.capture`, made once for models that are equal: the same classes, attributes, tensors and inputs.

    The program shares the tensors of the model that is given, as one that was just captured does. A model that cannot be
    pickled (of a local class, say) has no key and is captured.
    """
    found = _key(model, args, kwargs)
    if found is None:
        return rewrite.capture(model, args, kwargs)
    key, tensors = found
    if key not in STORE.kept:
        program = rewrite.capture(model, args, kwargs)
        memo: dict[int, Any] = {}
        copies = [copy.deepcopy(t, memo) for t in tensors]
        STORE.kept[key] = _bound(program, memo), copies
        return program
    program, copies = STORE.kept[key]
    again = _bound(program, {id(old): new for old, new in zip(copies, tensors, strict=True)})
    return replace(again, example_args=tuple(args), example_kwargs=dict(kwargs or {}))


def _bound(program: Program, memo: dict[int, Any]) -> Program:
    """A copy of a program with other tensors."""
    return replace(program, module=copy.deepcopy(program.module, memo))


def _key(*parts: Any) -> tuple[str, list[Tensor]] | None:
    """What tells parts from others, and their tensors in order; None where they have what cannot be pickled."""
    stream = io.BytesIO()
    pickler = _Hashing(stream)
    try:
        pickler.dump((parts, torch.get_default_dtype(), torch.is_grad_enabled()))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, ValueError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest(), pickler.tensors


class _Hashing(pickle.Pickler):
    """A pickler that puts digests for tensors, and notes them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=4)
        self.tensors: list[Tensor] = []
        self.seen: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.seen:
            self.seen[id(value)] = len(self.tensors)
            self.tensors.append(value)
        plain = value.detach().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
        form = (type(value).__name__, str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad)
        return (self.seen[id(value)], digest, value.is_leaf, *form)


@functools.cache
def shared(name: str) -> Program:
    """The program of a case (see `tests.compare.case`), captured by the first worker that asks and read by the others."""
    found = stored(f"{name} as it is", lambda: captured(name))
    assert found is not None
    return found


def stored(title: str, make: Callable[[], Program | None]) -> Program | None:
    """What `make` gives, or what it gave in another worker, from a file; None where it gives none."""
    if not STORE.folder:
        return make()
    file = STORE.folder[0] / f"{title}.pt2"
    none = file.with_suffix(".none")
    with FileLock(f"{file}.lock"):
        if file.exists():
            return rewrite.load(file)
        made = None if none.exists() else make()
        if made is None:
            none.touch()
        else:
            rewrite.save(made, file)
        return made
