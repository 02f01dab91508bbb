"""Sites: the calls of layers of some classes, as a selector chooses among them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import module_stack
from rewrite.graph.program import Program


class Site(NamedTuple):
    """One call of a layer: its node, the layer's path, the names that ``type:`` selects it by, the layer."""

    node: Node
    path: str
    types: tuple[str, ...]
    layer: Any


def sites(program: Program, *kinds: type[nn.Module]) -> list[Site]:
    """Every call of a layer of these classes, in execution order."""
    return [site_of(node, layer) for node, layer in program.layers() if isinstance(layer, kinds)]


def site_of(node: Node, layer: nn.Module) -> Site:
    """The site of a call: its types are the layer's class and the user's."""
    stack = module_stack(node)
    names = (type(layer).__name__, stack[-1][2].rpartition(".")[2] if stack else "")
    return Site(node, str(node.target), tuple(dict.fromkeys(name for name in names if name)), layer)
