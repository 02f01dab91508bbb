"""The property ``recompute``: what layers and regions give is computed again in the backward, in place of being kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from rewrite.errors import RewriteError
from rewrite.graph.program import LayerGraph
from rewrite.graph.properties import Property

from .chain import Outer
from .regions import checkpointed, segmented, unwritten


def check(value: Any) -> None:
    """Raise RewriteError for a value that ``recompute`` cannot have."""
    whole = isinstance(value, Mapping) and value.keys() == {"outputs", "regions"}
    if not whole or not all(isinstance(path, str) for paths in value.values() for path in paths):
        raise RewriteError("recompute takes outputs and regions, each a list of module paths")


@contextmanager
def around(module: nn.Module, inputs: Sequence[torch.Tensor], value: Any) -> Iterator[None]:
    """Let the backward compute again what the layers at ``outputs`` gave, and all that ``regions`` keep for themselves.

    Of a layer at ``outputs`` its input is kept, not its result; it must be a function of that input alone. A module that
    has nothing at a path keeps there what it kept.
    """
    if not torch.is_grad_enabled():
        yield
        return
    saver = _Saver()
    with compiled(module, inputs, value), ExitStack() as stack:
        for _, layer in _found(module, value["outputs"]):
            handle = layer.register_forward_hook(saver.note, with_kwargs=True)
            stack.callback(handle.remove)
        if value["outputs"]:
            stack.enter_context(saved_tensors_hooks(saver.pack, saver.unpack))
        yield


@contextmanager
def compiled(module: nn.Module, inputs: Sequence[torch.Tensor], value: Any) -> Iterator[None]:
    """Regions alone, where the forward is compiled: what layers gave is computed again where the compiler finds it cheap."""
    regions = [] if isinstance(module, LayerGraph) or not torch.is_grad_enabled() else value["regions"]
    with ExitStack() as stack:
        for path, layer in _found(module, regions):
            stack.enter_context(_checkpointing(path, layer))
        yield


RECOMPUTE = Property(around, check, execute=segmented, rank=2, compiled=compiled)


def _found(module: nn.Module, paths: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    every = dict(module.named_modules(remove_duplicate=False))
    yield from ((path, every[path]) for path in paths if path in every)


@contextmanager
def _checkpointing(path: str, layer: nn.Module) -> Iterator[None]:
    own = layer.__dict__.get("forward")
    layer.__dict__["forward"] = checkpointed(layer.forward, [layer])
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        if own is not None:
            layer.__dict__["forward"] = own


class Source(NamedTuple):
    """How a storage comes about: a layer's forward, what it was given (tensors packed), and under which autocast."""

    inputs: tuple[Any, ...]
    run: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    memo: _Memo


class Again(NamedTuple):
    """A tensor that is computed again: its storage's source, and how it lies in there."""

    source: Source
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Memo:
    """What was computed, while some of the tensors that were packed out of it have not come back yet."""

    packed: int = 0
    given: int = 0
    value: torch.Tensor | None = None


@dataclass
class _Saver:
    """Knows the results of layers by their storage, and packs them as the layers' inputs."""

    outer: Outer = field(default_factory=Outer)
    known: dict[int, tuple[StorageWeakRef, int, Source]] = field(default_factory=dict)

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """The forward hook of a layer whose result is to be computed again."""
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return
        given = [*args, *kwargs.values()]
        places = [i for i, each in enumerate(given) if isinstance(each, torch.Tensor)]
        if any(_shares(given[i], output) for i in places):
            return
        kept = tuple(self.pack(given[i]) for i in places)
        others = [None if i in places else each for i, each in enumerate(given)]
        run = _Run(layer, layer.training, others, places, tuple(kwargs), _autocast(output.device.type))
        source = Source(kept, run, _Memo())
        storage = output.untyped_storage()
        self.known[storage.data_ptr()] = (StorageWeakRef(storage), output._version, source)

    def pack(self, tensor: torch.Tensor) -> Any:
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided:
            found = self.known.get(tensor.untyped_storage().data_ptr())
            if found is not None and not found[0].expired() and found[1] == tensor._version:
                found[2].memo.packed += 1
                return Again(found[2], tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return self.outer.pack(tensor)

    def unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, Again):
            return self.outer.unpack(kept)
        memo = kept.source.memo
        if memo.value is None:
            memo.value = kept.source.run([self.unpack(each) for each in kept.source.inputs])
        found = memo.value.as_strided(kept.size, kept.stride, kept.offset)
        memo.given += 1
        if memo.given % memo.packed == 0:
            memo.value = None
        return found


@dataclass(frozen=True)
class _Run:
    """Calls a layer's forward with tensors in the places of those that it was given: without gradient, in the mode that it
    was in, its buffers left as they are.
    """

    layer: nn.Module
    training: bool
    given: Sequence[Any]
    places: Sequence[int]
    keywords: tuple[str, ...]
    autocast: Callable[[], Any]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        values = list(self.given)
        for place, tensor in zip(self.places, tensors, strict=True):
            values[place] = tensor
        count = len(values) - len(self.keywords)
        keywords = dict(zip(self.keywords, values[count:], strict=True))
        mode, self.layer.training = self.layer.training, self.training
        try:
            with torch.no_grad(), self.autocast(), unwritten([self.layer]):
                found: torch.Tensor = self.layer.forward(*values[:count], **keywords)
        finally:
            self.layer.training = mode
        return found


def _autocast(device: str) -> Callable[[], Any]:
    """Makes the autocast context that is active here."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled, cache_enabled=False)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
