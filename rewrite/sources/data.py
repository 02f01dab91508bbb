"""Data to run a model on, from an iterable, a file or a folder of files: calls of the model, one after the other."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch

from rewrite.errors import RewriteError
from rewrite.torch_private import pytree

from .data_files import check_files, digest_of, read
from .input_text import as_call

BATCH = 32
"""Into batches of how many samples tensors are cut that hold all samples of a file."""


class Call(NamedTuple):
    """The arguments of one call; ``spare`` ones may be more than the model takes, such as the labels of a DataLoader."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    spare: bool = False


@dataclass(frozen=True)
class Data:
    """Calls of a model, gone through any number of times, each time in the same order: nothing of the source is kept.

    Iterating gives each ``Call``; tensors that hold all samples of a file are cut along their first axis into batches.
    """

    source: Any
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, data: Any) -> Data:
        """Data from an iterable, a tensor or a dict of tensors that hold all samples, a file or a folder of files.

        The items of an iterable are a tensor, a tuple of positional arguments, a dict of keyword arguments, the pair
        (args, kwargs), or a list: a DataLoader's batch, of which the model takes what it knows. A file is .npz, .pt or
        .safetensors: tensors by the names of arguments, all samples along their first axis, or in a .pt a list of items.
        What can be gone through only once, as a generator, is kept in memory.

        Raises RewriteError for anything else, and for a file that is not there or cannot be read.
        """
        if isinstance(data, Data):
            return data
        if isinstance(data, str | Path):
            return cls(None, check_files(Path(data)))
        if isinstance(data, Iterator):
            return cls(list(data))
        if not isinstance(data, Iterable):
            raise RewriteError(f"data is an iterable, a file or a folder of files, not a {type(data).__name__}")
        return cls(data)

    def __iter__(self) -> Iterator[Call]:
        return self.calls()

    def calls(self, batch: int = BATCH) -> Iterator[Call]:
        """Every call; where tensors hold all samples, batches of ``batch`` are cut from them."""
        for number, item in enumerate(self._items()):
            if isinstance(item, _Samples):
                yield from item.batches(batch, number)
            else:
                yield call_of(item, number)

    def count(self) -> int | None:
        """How many calls there are, where that is known beforehand."""
        known = not self.files and not isinstance(self.source, torch.Tensor | Mapping) and hasattr(self.source, "__len__")
        try:
            return len(self.source) if known else None
        except TypeError:  # a DataLoader over an iterable has a length that it does not know
            return None

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the files, or of the bytes of all tensors and the text of everything else, in order."""
        made = hashlib.sha256()
        if self.files:
            for path in self.files:
                made.update(digest_of(path))
            return made.hexdigest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for call in self:
                for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))):
                    made.update(_bytes(leaf))
        return made.hexdigest()

    def _items(self) -> Iterator[Any]:
        if isinstance(self.source, torch.Tensor | Mapping):
            yield _Samples(self.source)
        elif not self.files:
            yield from self.source
        for path in self.files:
            found = read(path)
            if isinstance(found, list):
                yield from found
            else:
                yield _Samples(found)


@dataclass(frozen=True)
class _Samples:
    """One item whose tensors may hold many samples along their first axis."""

    item: Any

    def batches(self, batch: int, number: int) -> Iterator[Call]:
        call = call_of(self.item, number)
        tensors = [t for t in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(t, torch.Tensor)]
        sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
        total = sizes.pop() if len(sizes) == 1 else 0
        if total <= batch:
            yield call
            return
        for start in range(0, total, batch):
            piece = functools.partial(_piece, start=start, stop=start + batch)
            args, kwargs = pytree.tree_map_only(torch.Tensor, piece, (call.args, dict(call.kwargs)))
            yield Call(args, kwargs, call.spare)


def _piece(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]


def call_of(item: Any, number: int = 0) -> Call:
    """The call that an item stands for; ``number`` tells which one it is. Raises RewriteError for what is none."""
    item = pytree.tree_map_only(numpy.ndarray, torch.from_numpy, dict(item) if isinstance(item, Mapping) else item)
    args, kwargs = as_call(item, f"item {number} of the data")
    return Call(args, kwargs, spare=isinstance(item, list | dict))


def _bytes(leaf: Any) -> bytes:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf).encode()
    head = f"{leaf.dtype}{tuple(leaf.shape)}".encode()
    if leaf.is_meta:
        return head
    return head + leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fitted(call: Call, known: Sequence[str]) -> Call:
    """A call with no more than the arguments ``known``, in order: what is spare beyond them is left out.

    Names that are none of these, as in a file of numpy's (``arr_0``), count in their order where none is known.
    """
    if not call.spare:
        return call
    if call.kwargs and not set(call.kwargs) & set(known):
        return Call(tuple(call.kwargs.values())[: len(known)], {})
    return Call(call.args[: len(known)], {name: value for name, value in call.kwargs.items() if name in known})
