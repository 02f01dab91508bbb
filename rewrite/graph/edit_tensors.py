"""Edits of parameters and buffers, and the maps by which the proof follows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError

from .change import Kind
from .journal import Journal
from .maps import Compute, Constant, ParameterMap
from .nodes import attribute
from .tree import Places, names_of_tensors


class TensorEdits(Journal):
    """Parameters are set, made and untied."""

    def set_parameter(self, path: str, value: torch.Tensor | Compute, *sources: str) -> None:
        """Set the parameter or buffer at ``path``, to a tensor or to ``value(*sources)``; all places that share it follow.

        Given as a function of other parameters (their names as they are now, or were in a layer that was replaced), the
        change can be proven: the proof evaluates it in float64 and pulls gradients back to the sources. It then may have
        another shape, and one that is not there yet is made, as a parameter if a source is one.

        Raises RewriteError where there is no such layer, and no such parameter either unless ``value`` is a function.
        """
        made = None if isinstance(value, torch.Tensor) else self._map(value, sources)
        old = attribute(self.program.module, path)
        if old is None and made is None:
            raise RewriteError(f"there is no parameter or buffer {path}")
        given = [self._tensor(source) for source in sources]
        with torch.no_grad():
            new = _own(value if isinstance(value, torch.Tensor) else value(*given), [*given, value])
        trained = old.requires_grad if isinstance(old, torch.Tensor) else any(t.requires_grad for t in given)
        is_parameter = isinstance(old, nn.Parameter) if old is not None else any(isinstance(t, nn.Parameter) for t in given)
        self._hold(path, nn.Parameter(new, trained) if is_parameter else new)
        shape = tuple(old.shape) if isinstance(old, torch.Tensor) else "none"
        self._note("set parameter", path, "", f"{shape} -> {tuple(new.shape)}", map=made)
        if made is not None:
            self._maps[path] = made

    def untie(self, path: str) -> list[str]:
        """Give the tensor at ``path`` memory of its own, with the same values; the names that it was shared with.

        Raises RewriteError where it is shared with nothing.
        """
        tensor = self._tensor(path)
        others = [name for name in names_of_tensors(self.program.module)[id(tensor)] if name != path]
        if not others:
            raise RewriteError(f"{path} is shared with nothing")
        holder, name = self._parent(path)
        held = holder._parameters if name in holder._parameters else holder._buffers
        copy = tensor.detach().clone()
        held[name] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        self._places = Places(self.program.module)
        source = min((path, *others), key=list(dict(self._named())).index)
        detail = f"was one with {', '.join(others)}"
        untied: tuple[tuple[str, Kind], ...] = ((path, "untie"), (others[0], "set parameter"))
        for own, kind in untied:  # each is known to the proof by its first name
            self._maps[own] = self._map(_itself, (source,))
            self._note(kind, own, "", detail if own == path else f"no longer one with {path}", map=self._maps[own])
        return others

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.program.module.named_parameters(remove_duplicate=False)
        yield from self.program.module.named_buffers(remove_duplicate=False)

    def _map(self, compute: Compute, sources: Sequence[str]) -> ParameterMap:
        return ParameterMap(compute, tuple(self._origin(source) for source in sources))

    def _origin(self, source: str) -> str | ParameterMap:
        """What a source was before the pass; what came with a new module was nothing, and is what it is."""
        parts = source.split(".")
        came = any(".".join(parts[:i]) in self._came for i in range(1, len(parts) + 1))
        if source in self._maps or not came:
            return self._maps.get(source, source)
        return ParameterMap(Constant(self._tensor(source).detach()), ())

    def _hold(self, path: str, new: torch.Tensor) -> None:
        holder, name = self._parent(path)
        if not isinstance(holder, nn.Module):
            raise RewriteError(f"there is no layer at {path.rpartition('.')[0]}")
        kinds: list[dict[str, Any]] = [holder._parameters, holder._buffers]
        held = next((h for h in kinds if h.get(name) is not None), None)
        if held is not None:
            self._places.set(held, name, new)
        elif isinstance(new, nn.Parameter):
            holder._parameters[name] = new
        else:
            holder._buffers[name] = new


def _own(value: torch.Tensor, sources: Sequence[object]) -> torch.Tensor:
    """A tensor in memory of its own, in order: as it is, or a copy where it may share a source's."""
    value = value.detach()
    memory = value.untyped_storage()
    shared = [t.untyped_storage().data_ptr() for t in sources if isinstance(t, torch.Tensor)]
    whole = value.is_contiguous() and memory.nbytes() == value.numel() * value.element_size()
    return value if whole and memory.data_ptr() not in shared else value.clone()


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
