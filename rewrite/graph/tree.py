"""Questions and changes of a tree of modules: names of what hangs there, putting a module wherever another one hung."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

Held = dict[tuple[int, str], tuple[dict[str, Any], str]]
"""Places by their identity: each a dictionary of a module (its parameters, buffers or children) and a name in it."""


def adopt(layer: nn.Module, old: nn.Module) -> None:
    """Give ``layer`` the parameters, buffers and modules of ``old``, in ``old``'s order, the layer's own ones first
    where both have a name.
    """
    for kind in ("_parameters", "_buffers", "_modules"):
        ours, theirs = getattr(layer, kind), getattr(old, kind)
        merged = {k: (ours[k] if ours.get(k) is not None else v) for k, v in theirs.items()}
        merged.update({k: v for k, v in ours.items() if k not in merged})
        ours.clear()
        ours.update(merged)
    layer._non_persistent_buffers_set |= old._non_persistent_buffers_set
    layer.training = old.training


class Places:
    """Where each module and tensor of a tree hangs (a shared one in several places), kept as modules are put."""

    def __init__(self, root: nn.Module) -> None:
        self._held: dict[int, Held] = {}
        for module in root.modules():
            self._add(module)

    def put(self, holder: nn.Module, name: str, layer: nn.Module) -> None:
        """Set ``layer`` as the child ``name`` of ``holder``, and wherever else the module there hangs."""
        old = holder._modules.get(name)
        self._replace(holder._modules, name, layer)
        if old is not None:
            self._forget(old)
        for module in list(self._unknown(layer)):
            self._add(module)

    def set(self, held: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
        """Set a parameter or buffer in a module's dictionary, and wherever else the one there hangs."""
        self._replace(held, name, tensor)

    def _replace(self, held: dict[str, Any], name: str, new: Any) -> None:
        old = held.get(name)
        places = {(id(held), name): (held, name)}
        if old is not None:
            places = {**self._held.pop(id(old), {}), **places}
        places = {key: (other, own) for key, (other, own) in places.items() if other.get(own) is old}
        for other, own in places.values():
            other[own] = new
        self._held.setdefault(id(new), {}).update(places)

    def _add(self, module: nn.Module) -> None:
        for held in (module._parameters, module._buffers, module._modules):
            for name, thing in held.items():
                if thing is not None:
                    self._held.setdefault(id(thing), {})[id(held), name] = (held, name)

    def _forget(self, module: nn.Module) -> None:
        """What a module that hangs nowhere any more holds does not hang there."""
        for held in (module._parameters, module._buffers, module._modules):
            for name, thing in held.items():
                self._held.get(id(thing), {}).pop((id(held), name), None)

    def _unknown(self, layer: nn.Module) -> Iterator[nn.Module]:
        """A layer and the modules below it that hang nowhere yet."""
        yield layer
        for child in layer._modules.values():
            if child is not None and id(child) not in self._held:
                yield from self._unknown(child)


def names_of_modules(root: nn.Module) -> dict[int, list[str]]:
    """Every name of each module, by its identity."""
    return _names(root.named_modules(remove_duplicate=False))


def names_of_tensors(root: nn.Module) -> dict[int, list[str]]:
    """Every name of each parameter and buffer, by its identity: tied ones have several."""
    names = _names(root.named_parameters(remove_duplicate=False))
    for key, others in _names(root.named_buffers(remove_duplicate=False)).items():
        names.setdefault(key, []).extend(others)
    return names


def _names(named: Iterator[tuple[str, Any]]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, thing in named:
        names.setdefault(id(thing), []).append(name)
    return names


def tied(root: nn.Module) -> list[tuple[str, ...]]:
    """The names of each parameter that has more than one."""
    return [tuple(g) for g in _names(root.named_parameters(remove_duplicate=False)).values() if len(g) > 1]


def on_meta(*modules: nn.Module) -> bool:
    """Whether a parameter or buffer has no data: it is on the meta device."""
    return any(t.is_meta for module in modules for t in [*module.parameters(), *module.buffers()])
