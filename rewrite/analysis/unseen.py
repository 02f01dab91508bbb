"""What analyses of layers do not see: operators of a kind that compute with the model's parameters outside of any layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import aten, attribute, module_path, packet, tensor_value
from rewrite.graph.program import Program

from .linears import linears

Kind = Literal["linear", "convolution", "norm", "embedding"]

_OPERATORS: dict[Kind, tuple[Any, ...]] = {
    "linear": (aten.linear, aten.matmul, aten.mm, aten.mv, aten.addmm, aten.bmm, aten.baddbmm, aten.einsum),
    "convolution": tuple(getattr(aten, f"conv{t}{rank}d") for t in ("", "_transpose") for rank in (1, 2, 3)),
    "norm": (aten.layer_norm, aten.rms_norm),
    "embedding": (aten.embedding, aten.embedding_bag),
}
_SHOWN = 3


@dataclass(frozen=True)
class Unseen:
    """An operator that computes with parameters, directly or with what was computed from them, and is no layer."""

    node: Node
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        where = module_path(self.node)
        return f"{packet(self.node).__name__} of {', '.join(self.parameters)}{f' in {where}' if where else ''}"


def unseen(program: Program, *kinds: Kind) -> list[Unseen]:
    """The operators of these kinds that compute with parameters and that no analysis knows, in execution order.

    A product counts as known where ``analysis.linears`` knows it.
    """
    known = {linear.node for linear in linears(program)}
    wanted = {operator for kind in kinds for operator in _OPERATORS[kind]}
    sources = _Sources(program)
    found = (Unseen(n, sources.of(n)) for n in program.graph.nodes if packet(n) in wanted and n not in known)
    return [each for each in found if each.parameters]


def unseen_text(program: Program, *kinds: Kind) -> str | None:
    """What a pass that looks for layers of these kinds should warn of; None where it sees all of them."""
    found = [str(each) for each in unseen(program, *kinds)]
    if not found:
        return None
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"left alone, since computed outside of any layer: {'; '.join(found[:_SHOWN])}{more}"


class _Sources:
    """From which parameters the operands of operators are computed that follow from parameters alone."""

    def __init__(self, program: Program) -> None:
        self._names: dict[Node, tuple[str, ...]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr":
                parameter = isinstance(attribute(program.module, str(node.target)), nn.Parameter)
                self._names[node] = (str(node.target),) if parameter else ()
            elif node.op == "call_function" and all(s in self._names for s in node.all_input_nodes if _is_data(s)):
                self._names[node] = tuple(_joined(self._names.get(s, ()) for s in node.all_input_nodes))

    def of(self, node: Node) -> tuple[str, ...]:
        """The parameters behind the matrices among a node's operands."""
        return tuple(_joined(self._names.get(s, ()) for s in node.all_input_nodes if _is_data(s)))


def _is_data(node: Node) -> bool:
    return tensor_value(node) is not None or isinstance(node.meta.get("val"), tuple | list)


def _joined(names: Iterable[tuple[str, ...]]) -> Iterator[str]:
    return iter(dict.fromkeys(name for group in names for name in group))
