"""Sibling linears: linear layers that read one value, so that they can be one layer, with the reason where they cannot."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import gives_kind_alone
from rewrite.graph.program import Program
from rewrite.graph.tree import names_of_tensors

from .writes import Writes

Within = Literal["module", "block", "model"]
_PLAIN = frozenset(vars(nn.Linear(1, 1, device="meta")))


@dataclass(frozen=True)
class Sibling:
    """One linear layer and the one call of it, ``order`` its number among all calls of layers."""

    path: str
    node: Node
    layer: nn.Linear
    order: int

    @property
    def kind(self) -> tuple[tuple[str, Hashable], ...]:
        """What two linears must have in common to be one, each with the words for a difference."""
        weight, bias = self.layer.weight, self.layer.bias
        return (
            ("having a bias", bias is not None),
            ("dtype", (weight.dtype, bias is not None and bias.dtype)),
            ("device", weight.device),
            ("requires_grad", (weight.requires_grad, bias is not None and bias.requires_grad)),
            ("mode", self.layer.training),
        )


@dataclass
class Siblings:
    """Groups of linears that can be one, in the order of the module tree, and why others that read one value cannot."""

    groups: list[tuple[Sibling, ...]] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)


def siblings(program: Program, within: Within = "block") -> Siblings:
    """The groups of two or more linears that read one value, within one module, one block, or anywhere.

    A block is what stands at one number of a list of modules (``layers.3``); outside of lists it is the model.
    """
    found, layers = Siblings(), _Layers(program)
    for family in _families(program, within):
        free = [s for s in family if not found.obstacles.setdefault(s.path, layers.obstacle(s))]
        for group in _alike(free, found):
            if layers.writes.between([s.node for s in group]):
                found.obstacles.update((s.path, "what they read is written in place between their calls") for s in group)
            else:
                found.groups.append(tuple(sorted(group, key=lambda s: layers.place[s.path])))
    found.obstacles = {path: reason for path, reason in found.obstacles.items() if reason}
    return found


def _families(program: Program, within: Within) -> Iterator[list[Sibling]]:
    """Linears that read one value, whatever else keeps them apart; two or more different layers."""
    families: dict[Hashable, dict[str, Sibling]] = defaultdict(dict)
    for order, (node, layer) in enumerate(program.layers()):
        if isinstance(layer, nn.Linear) and len(node.args) == 1 and not node.kwargs:
            path = str(node.target)
            families[node.args[0], scope(path, within)].setdefault(path, Sibling(path, node, layer, order))
    yield from (list(family.values()) for family in families.values() if len(family) > 1)


def scope(path: str, within: Within) -> str:
    """The path of the module, or of the block, that a layer belongs to."""
    if within == "module":
        return path.rpartition(".")[0]
    parts = path.split(".")[:-1]
    number = next((i for i, part in enumerate(parts, 1) if part.isdecimal()), 0)
    return ".".join(parts[:number]) if within == "block" else ""


class _Layers:
    """What stands in the way of a single linear: calls, shared tensors, readers, writers, classes."""

    def __init__(self, program: Program) -> None:
        self.calls = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_module")
        self.names = names_of_tensors(program.module)
        self.read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and not gives_kind_alone(n)}
        self.writes = Writes(program.graph, program.module)
        self.place = {path: i for i, (path, _) in enumerate(program.module.named_modules(remove_duplicate=False))}

    def obstacle(self, sibling: Sibling) -> str:
        """Why a linear must stay as it is; empty if nothing stands in the way."""
        return next(filter(None, (reason(sibling) for reason in self._reasons)), "")

    @property
    def _reasons(self) -> Iterable[Callable[[Sibling], str]]:
        return (_another_class, self._called_again, self._shared, self._written)

    def _called_again(self, sibling: Sibling) -> str:
        return "it is called more than once" if self.calls[sibling.path] > 1 else ""

    def _shared(self, sibling: Sibling) -> str:
        for tensor in (sibling.layer.weight, sibling.layer.bias):
            others = [n for n in self.names.get(id(tensor), ()) if n.rpartition(".")[0] != sibling.path]
            if others:
                return f"it shares a tensor with {others[0]}"
            if self.read.intersection(self.names.get(id(tensor), ())):
                return "the model's code reads its tensors besides calling it"
        return ""

    def _written(self, sibling: Sibling) -> str:
        return "its output is written in place" if self.writes.into(sibling.node) else ""


def _another_class(sibling: Sibling) -> str:
    layer = sibling.layer
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, which is more than a linear layer"
    hooked = any(value for name, value in vars(layer).items() if name.endswith("_hooks"))
    return "it has hooks or attributes of its own" if hooked or vars(layer).keys() - _PLAIN or layer._modules else ""


def _alike(family: Sequence[Sibling], found: Siblings) -> Iterator[list[Sibling]]:
    """The parts of a family that are alike in kind; a linear that is like no other is left alone."""
    parts: dict[Hashable, list[Sibling]] = defaultdict(list)
    for sibling in family:
        parts[sibling.kind].append(sibling)
    for kind, part in parts.items():
        if len(part) > 1:
            yield part
        elif len(family) > 1:
            other = next(s for s in family if s.kind != kind)
            words = f"it differs from {other.path}, which reads the same, in {_difference(part[0], other)}"
            found.obstacles[part[0].path] = words


def _difference(a: Sibling, b: Sibling) -> str:
    return next(word for (word, x), (_, y) in zip(a.kind, b.kind, strict=True) if x != y)


def joined_name(paths: Sequence[str]) -> str:
    """One name for several layers: ``q_proj, k_proj, v_proj`` are ``qkv_proj``, ``gate_proj, up_proj`` ``gate_up_proj``.

    Names of several modules are joined module by module: ``attn_qkv_mlp_fc1``.
    """
    split = [path.rpartition(".") for path in paths]
    parts = []
    for parent, members in itertools.groupby(split, key=lambda s: s[0]):
        leaf = _joined_leaf([name for _, _, name in members])
        parts.append(f"{parent.replace('.', '_')}_{leaf}" if parent else leaf)
    return "_".join(parts)


def _joined_leaf(names: Sequence[str]) -> str:
    words = [name.split("_") for name in names]
    shortest = min(map(len, words))
    end = _common([w[::-1] for w in words], shortest - 1)
    start = _common(words, shortest - 1 - end)
    middles = ["_".join(w[start : len(w) - end]) for w in words]
    short = all(len(m) == 1 and m.isalpha() for m in middles)
    return "_".join([*words[0][:start], ("" if short else "_").join(middles), *words[0][len(words[0]) - end :]])


def _common(words: Sequence[Sequence[str]], limit: int) -> int:
    """How many words all have in common at the start, at most ``limit``."""
    same = (len(set(column)) == 1 for column in zip(*words, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, itertools.islice(same, max(limit, 0))))
