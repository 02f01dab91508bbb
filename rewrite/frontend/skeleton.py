"""The tree of plain modules under a layer graph: the model's parameters and buffers in their order, and its layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, Node

from rewrite.graph.nodes import attribute, module_stack
from rewrite.graph.program import Container
from rewrite.graph.tree import Places, adopt


class Skeleton:
    """Builds the module tree: containers first, then a layer at each path that lifting fills."""

    def __init__(self, model: nn.Module) -> None:
        self.root = _mirror(model, {})
        self.places = Places(self.root)
        self.layers: dict[str, tuple[nn.Module, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()

    def contain(self, paths: Iterable[str]) -> None:
        """Make room for modules that calls name and the model lacks: an export does not keep those without tensors."""
        for path in dict.fromkeys(paths):
            holder = self.root
            for part in path.split(".") if re.fullmatch(r"\w+(\.\w+)*", path) else ():
                if part in holder._parameters or part in holder._buffers:
                    break
                found = holder._modules.setdefault(part, Container())
                assert found is not None
                holder = found

    def index(self, graph: Graph) -> None:
        """Count the calls of each module call key, so that ``path_for`` can tell a whole call from a part of one."""
        self.counts = Counter(
            key for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output") for key, _, _ in module_stack(n)
        )

    def covers(self, nodes: Sequence[Node]) -> bool:
        """Whether ``nodes`` are the whole of their innermost module call."""
        stacks = [module_stack(n) for n in nodes]
        if not stacks or not all(stacks):
            return False
        depth = _shared_depth(stacks)
        key = stacks[0][depth - 1][0] if depth else ""
        inside = sum(1 for s in stacks if key in {k for k, _, _ in s})
        return bool(depth) and inside == self.counts[key]

    def path_for(self, nodes: Sequence[Node], name: str) -> tuple[str, bool]:
        """Where a layer without parameters belongs: the module whose call it is, whole, or a new name beside."""
        stacks = [module_stack(n) for n in nodes]
        depth = _shared_depth(stacks)
        path = stacks[0][depth - 1][1] if depth else ""
        if path and self.covers(nodes) and path not in self.layers and not self.holds_anything(path):
            return path, True
        return self.fresh(f"{path}.{name}" if path else name), False

    def holds_anything(self, path: str) -> bool:
        """Whether the module at a path has parameters, buffers or children of its own."""
        module = attribute(self.root, path)
        if module is None:
            return True
        return any(v is not None for kind in (module._parameters, module._buffers, module._modules) for v in kind.values())

    def fresh(self, path: str) -> str:
        """``path``, or the first of ``path_1``, ``path_2``, ... that is free; higher up where its parent is not there."""
        parent, _, name = path.rpartition(".")
        while parent and attribute(self.root, parent) is None:
            parent = parent.rpartition(".")[0]
        path = f"{parent}.{name}" if parent else name
        holder = attribute(self.root, parent) if parent else self.root
        number = self.numbers[path]  # where the last search ended: those before it are taken
        candidate = f"{name}_{number}" if number else name
        while hasattr(holder, candidate):
            number += 1
            candidate = f"{name}_{number}"
        self.numbers[path] = number
        return f"{parent}.{candidate}" if parent else candidate

    def put(self, path: str, layer: nn.Module, config: Any = None) -> None:
        """Set ``layer`` at ``path``; what the container there held, and the layer does not, stays under the layer."""
        parent, _, name = path.rpartition(".")
        holder = attribute(self.root, parent) if parent else self.root
        old = holder._modules.get(name)
        if old is not None:
            adopt(layer, old)
        self.places.put(holder, name, layer)
        self.layers[path] = (layer, config)

    def place(self, nodes: Sequence[Node], name: str, layer: nn.Module) -> str:
        """Put a parameterless layer that stands for ``nodes`` where it belongs; its path."""
        path, _ = self.path_for(nodes, name)
        self.put(path, layer)
        return path


def _shared_depth(stacks: Sequence[Sequence[tuple[str, str, str]]]) -> int:
    depth = 0
    while all(len(s) > depth for s in stacks) and len({s[depth][0] for s in stacks}) == 1:
        depth += 1
    return depth


def _mirror(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    made: nn.Module = Container()
    memo[id(module)] = made
    made.training = module.training
    for name, parameter in module._parameters.items():
        made._parameters[name] = parameter
    for name, buffer in module._buffers.items():
        made._buffers[name] = buffer
    made._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if child is not None:
            made._modules[name] = _mirror(child, memo)
    return made
