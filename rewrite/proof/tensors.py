"""The two programs of a proof, and copies of the layers and tensors that a form of one uses."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.maps import ParameterMap
from rewrite.graph.nodes import attribute
from rewrite.torch_private import _DropoutNd

from .setting import ITSELF, Setting, cast, one_ulp, projection


@dataclass(frozen=True)
class World:
    """One of the two programs: its module, the names of its tensors, and the maps that lead to its parameters.

    ``origin`` is the world before the pass, in whose tensors the maps are.
    """

    module: nn.Module
    names: Mapping[int, str]
    maps: Mapping[str, ParameterMap] = field(default_factory=dict)
    origin: World | None = None

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.names.values())

    @classmethod
    def of(cls, module: nn.Module, maps: Mapping[str, ParameterMap] | None = None, origin: World | None = None) -> World:
        """The world of a module; tied tensors go by their first name."""
        names: dict[int, str] = {}
        for name, tensor in [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]:
            names.setdefault(id(tensor), name)
        return cls(module, names, maps or {}, origin)


class TensorsOf:
    """Copies of the layers and tensors that some nodes use, each once; the leaves of the gradient by their names before.

    A parameter with a map is computed from copies of its sources, so that its gradient is theirs.
    """

    def __init__(
        self, world: World, nodes: Sequence[Node], setting: Setting, leaves: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.world = world
        self.setting = setting
        self.memo: dict[int, Any] = {}
        self.leaves: dict[str, torch.Tensor] = {} if leaves is None else leaves
        self.buffers: dict[str, torch.Tensor] = {}
        self.sources: set[str] = set()
        self.followed: dict[str, tuple[ParameterMap, torch.Tensor]] = {}
        self.layers: dict[str, nn.Module] = {}
        for path in dict.fromkeys(str(n.target) for n in nodes if n.op in ("call_module", "get_attr")):
            self._adopt(path)

    def fetch(self, path: str) -> Any:
        value = attribute(self.world.module, path)
        return self.memo.get(id(value), value)

    def layer(self, path: str) -> nn.Module:
        return self.layers[path]

    def called(self, nodes: Sequence[Node]) -> dict[str, nn.Module]:
        """The layers that some nodes call, by path, in their order."""
        return {str(n.target): self.layer(str(n.target)) for n in nodes if n.op == "call_module"}

    def state(self) -> dict[str, torch.Tensor]:
        """The buffers; what another one follows from is only read to make that."""
        read = {source for made, _ in self.followed.values() for source in made.names}
        return {name: t.detach() for name, t in self.buffers.items() if name not in read}

    def _adopt(self, path: str) -> None:
        found = attribute(self.world.module, path)
        if isinstance(found, torch.Tensor):
            self._copy(path, found)
            return
        if not isinstance(found, nn.Module):
            return
        for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
            self._copy(f"{path}.{name}", tensor)
        self.layers[path] = copy.deepcopy(found, self.memo).train(self.setting.training)
        if self.setting.silent:
            _silence(self.layers[path])

    def _copy(self, path: str, tensor: torch.Tensor) -> None:
        if id(tensor) in self.memo:
            return
        name = self.world.names.get(id(tensor), path)
        made = self.world.maps.get(name)
        if made is None:
            self.memo[id(tensor)] = self._leaf(name, tensor)
            return
        value = cast(made.evaluate(self._source), self.setting)
        if self.setting.apart and isinstance(tensor, nn.Parameter):
            value = self.leaves[f"{name}{ITSELF}"] = nn.Parameter(value.detach(), value.requires_grad)
            self.sources.update(made.names)
        self.memo[id(tensor)] = value
        if not isinstance(tensor, nn.Parameter):
            self.followed[name] = made, value

    def _source(self, name: str) -> torch.Tensor:
        origin = self.world.origin
        assert origin is not None
        tensor = attribute(origin.module, name)
        return self._leaf(origin.names.get(id(tensor), name), tensor)

    def _leaf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor, made once for each name."""
        known = self.leaves if isinstance(tensor, nn.Parameter) else self.buffers
        if name not in known:
            made = cast(tensor.detach(), self.setting).clone()
            if isinstance(tensor, nn.Parameter):
                moved = self._moved(made, name)
                made = nn.Parameter(one_ulp(moved) if self.setting.nudged else moved, tensor.requires_grad)
            known[name] = made
        return known[name]

    def _moved(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """An old parameter with noise of ``moved`` times its deviation (or 1), drawn from its name; a new one as it is."""
        moved, old = self.setting.moved, self.world.origin or self.world
        if not moved or name not in old.known or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        deviation = float(tensor.double().std()) if tensor.numel() > 1 else 0.0
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        return tensor + moved * (deviation or 1.0) * projection(tensor, seed)


def _silence(layer: nn.Module) -> None:
    """Set the rate of every dropout in a layer to 0."""
    for part in layer.modules():
        name = "p" if isinstance(part, _DropoutNd) else "dropout_p" if isinstance(part, ScaledDotProductAttention) else ""
        if name:
            setattr(part, name, 0.0)
