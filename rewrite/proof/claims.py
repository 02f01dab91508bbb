"""Two graphs held against each other: which values are claimed to be equal, which of these claims follow, which need a test.

A node of the graph after is claimed to equal the node of its name before, where shape and dtype agree; the name is only a
hint. The claim follows (the node is *free*) if both are one operation with the same literals, the same layer and operands
that are claimed equal. What does not follow is a *test*. A user with another operand claims that both operands are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import aten, attribute, gives_kind_alone, leaves, packet
from rewrite.graph.program import Program
from rewrite.graph.relation import Relation
from rewrite.torch_private import pytree

from .identity import Sameness

Pair = tuple[Node, Node]
"""A node before, and the node after that is claimed to have its value."""


@dataclass
class Claims:
    """The claims about two programs. ``partner`` leads from a node after to the node of its name before.

    ``relations`` are what a pass says of values by name: x' = r(x) instead of x' = x. ``related`` are those it claims.
    """

    before: Program
    after: Program
    partner: dict[Node, Node] = field(default_factory=dict)
    tests: dict[Pair, str] = field(default_factory=dict)
    relations: Mapping[str, Relation] = field(default_factory=dict)
    related: dict[Node, Relation] = field(default_factory=dict)
    dropped: set[Pair] = field(default_factory=set)
    varying: set[Node] = field(default_factory=set)
    _known: dict[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def of(cls, before: Program, after: Program, relations: Mapping[str, Relation] | None = None) -> Claims:
        """All claims about a program before and after a pass, from their graphs alone."""
        made = cls(before, after, relations=relations or {}, varying=varying(before) | varying(after))
        made.settle()
        return made

    def settle(self) -> None:
        """Find partners and tests anew, with the dropped claims left out."""
        named = {node.name: node for node in self.before.graph.nodes}
        self.partner.clear()
        self.tests.clear()
        self.related.clear()
        final = {new for _, new in self.final()}
        for new in self.after.graph.nodes:
            old = named.get(new.name)
            if old is None or (old, new) in self.dropped or new.op == "output":
                continue
            relation = self.relations.get(new.name) if new not in final and new in self.varying else None
            if relation is not None and new.op not in ("placeholder", "get_attr") and _alike(old, new):
                self.related[new] = relation
            elif not self._comparable(old, new):
                continue
            self.partner[new] = old
        for new, old in list(self.partner.items()):
            self._examine(old, new)
        for old, new in self.final():
            if not self.is_claimed(old, new):
                self.tests.setdefault((old, new), "an output")

    def drop(self, pair: Pair) -> None:
        """Withdraw a claim that does not hold: what uses it has to be tested instead."""
        self.dropped.add(pair)

    def final(self) -> list[Pair]:
        """The outputs of both programs: that they are equal is what all else is for, and is never dropped."""
        return list(self._operands(self.before.graph.output_node(), self.after.graph.output_node()))

    def is_claimed(self, old: Node, new: Node) -> bool:
        """Whether two nodes are claimed to have the same value, by their name."""
        return self.partner.get(new) is old

    def _comparable(self, old: Node, new: Node) -> bool:
        if old.op == "placeholder" or new.op == "placeholder":
            return old.op == new.op and _described(old) == _described(new)
        if gives_kind_alone(old) and gives_kind_alone(new):
            return bool(_kind_of(old) == _kind_of(new))
        if old.op == "get_attr" or new.op == "get_attr":
            return old.op == new.op and old.target == new.target and self._same_attribute(old)
        return bool(_described(old) == _described(new))

    def _same_attribute(self, old: Node) -> bool:
        left, right = (attribute(program.module, str(old.target)) for program in (self.before, self.after))
        return not self._difference_of(left, right)

    def _examine(self, old: Node, new: Node) -> None:
        if new.op in ("placeholder", "get_attr"):
            return
        reason = "it moves" if new in self.related else self._difference(old, new)
        for left, right in self._operands(old, new) if not reason else ():
            if right in self.related and not _from_sizes(new):
                reason = f"{right.name}, which it reads, moved"
            if not self.is_claimed(left, right) and not self._claim(left, right, "an operand that was rewired"):
                reason = f"other operands: {right.name} instead of {left.name}"
        if reason and new in self.varying and isinstance(new.meta.get("val"), torch.Tensor | tuple | list):
            self.tests[old, new] = reason
        elif reason:
            del self.partner[new]  # a size, a dtype, a piece of a parameter: what uses it is tested instead

    def _claim(self, old: Node, new: Node, reason: str) -> bool:
        """Claim that two operands are equal, to be tested; False if they cannot be."""
        if self.is_claimed(old, new) or (old, new) in self.tests:
            return True
        if (old, new) in self.dropped or not is_tensor(old) or _described(old) != _described(new):
            return False
        if old not in self.varying and new not in self.varying:
            return False
        self.tests[old, new] = reason
        return True

    def _operands(self, old: Node, new: Node) -> Iterator[Pair]:
        left, right = (list(leaves((n.args, dict(n.kwargs)))) for n in (old, new))
        for x, y in zip(left, right, strict=False):
            if isinstance(x, Node) and isinstance(y, Node):
                yield x, y

    def _difference(self, old: Node, new: Node) -> str:
        """Why two nodes are not one operation, apart from their operands; empty if they are."""
        if old.op != new.op:
            return f"{new.op} instead of {old.op}"
        if old.op == "call_function" and old.target is not new.target:
            return f"{new.target} instead of {old.target}"
        left, right = ([_outline(v) for v in leaves((n.args, dict(n.kwargs)))] for n in (old, new))
        if list(old.kwargs) != list(new.kwargs) or not Sameness().value(left, right):
            return "other arguments"
        return self._layer_difference(old, new) if old.op == "call_module" else ""

    def _layer_difference(self, old: Node, new: Node) -> str:
        return self._difference_of(self.before.layer(old), self.after.layer(new))

    def _difference_of(self, old: Any, new: Any) -> str:
        """In what two layers or tensors differ, all below them included; empty if in nothing. Asked once for each pair."""
        key = (id(old), id(new))
        if key not in self._known:
            self._known[key] = _difference(old, new)
        return self._known[key]


#: Layers of torch that call what is below them.
_HOLDERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.AdaptiveLogSoftmaxWithLoss,
)


def _difference(old: Any, new: Any) -> str:
    modules = isinstance(old, nn.Module) and isinstance(new, nn.Module)
    found = Sameness().unlike(old, new) if modules else None
    if modules and type(old).__module__.startswith("torch.nn.modules.") and not isinstance(old, _HOLDERS):
        return found or ""  # what hangs below it (a norm's own activation) the graph calls by itself
    return found or ("" if Sameness().value(old, new) else "something below it changed" if modules else "other values")


def _kind_of(node: Node) -> Any:
    value = node.meta.get("val")
    return (value.dtype, value.device) if isinstance(value, torch.Tensor) else None


def is_tensor(node: Node) -> bool:
    """Whether a node yields one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def varying(program: Program) -> set[Node]:
    """The nodes whose value depends on data that the program is given; the others follow from parameters and sizes."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        given = node.op == "placeholder" and is_tensor(node)
        if given or (not _from_sizes(node) and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _from_sizes(node: Node) -> bool:
    """Whether a node yields a number that follows from sizes, which is no data."""
    return not is_tensor(node) and packet(node) is not aten.item and not isinstance(node.meta.get("val"), tuple | list)


def _outline(value: Any) -> Any:
    return Node if isinstance(value, Node) else value


def _alike(old: Node, new: Node) -> bool:
    """Whether two nodes yield tensors of one dtype with as many axes, whatever their sizes."""
    x, y = old.meta.get("val"), new.meta.get("val")
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and (x.dtype, x.dim()) == (y.dtype, y.dim())


def _described(node: Node) -> Any:
    value = node.meta.get("val")
    return pytree.tree_map(_described_leaf, value)


def _described_leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(str(s) for s in value.shape), str(value.dtype))
    return str(value)
