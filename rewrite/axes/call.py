"""One call as a rule sees it: the dimensions of its arguments, the sizes of its value, and what can be noted about them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.nodes import attribute, hint_of, packet

from .dims import Conflict, Dim, cut, product, split, unify

Axes = list[Dim]
"""The dimensions of a tensor, one for each axis."""
_MOVED = frozenset({"transpose", "t", "mT", "numpy_T", "permute", "lift_fresh_copy", "contiguous", "detach", "alias", "to"})


@dataclass(frozen=True)
class Literal:
    """A number in a graph that is the size of a dimension: in the argument of a node, at a place in it if that is a list.

    ``region`` is the path of the region whose graph it is, "" for the program's own. What is counted from an end is ``sign``
    -1 times the size; an end of numbers that begin at ``start`` lies that much further.
    """

    node: Node
    argument: str
    place: int | None
    dim: Dim
    region: str = ""
    sign: int = 1
    start: int = 0


@dataclass(frozen=True)
class Attribute:
    """A plain attribute of a layer that is the size of a dimension, such as ``groups``; ``place`` in one that is a tuple."""

    path: str
    name: str
    dim: Dim
    place: int | None = None


@dataclass(frozen=True)
class Place:
    """One axis of one parameter or buffer, with what it does there: out, in, elementwise, rows, columns, kernel, ..."""

    path: str
    axis: int
    role: str
    dim: Dim


@dataclass(frozen=True)
class Score:
    """A product of two values along a dimension, as that of attention's queries and keys, in the program's own graph."""

    node: Node
    query: Node
    key: Node
    dim: Dim


@dataclass
class Notes:
    """What the walk over a program gathers."""

    literals: list[Literal] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    computed: dict[tuple[Node, int], Dim] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)
    tensors: dict[int, Axes] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def axes_of(self, tensor: torch.Tensor) -> Axes:
        """The dimensions of a parameter or buffer, the same for all that share it."""
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = [Dim(size) for size in tensor.shape]
        return self.tensors[id(tensor)]

    def place(self, tensor: torch.Tensor, axis: int, role: str) -> None:
        """Note what an axis of a parameter or buffer does."""
        axes, name = self.axes_of(tensor), self.names.get(id(tensor))
        if name is None:
            axes[axis].freeze("a constant has this size")
            return
        self.places.append(Place(name, axis % max(len(axes), 1), role, axes[axis]))


class Call:
    """A node with its arguments by name and the dimensions of the tensors among them."""

    def __init__(
        self,
        node: Node,
        named: Mapping[str, Any],
        known: Mapping[Node, Any],
        notes: Notes,
        module: nn.Module,
        region: str | None = "",
        value: Any = None,
    ) -> None:
        self.node = node
        self.value = node.meta.get("val") if value is None else value
        self.named = named
        self.known = known
        self.notes = notes
        self.module = module
        self.region = region
        self.in_norm = False

    # ---- what is there

    def axes(self, argument: Any) -> Axes:
        """The dimensions of a tensor argument, by its name or itself; none for a number."""
        value = self.named.get(argument) if isinstance(argument, str) else argument
        found = self.known.get(value) if isinstance(value, Node) else None
        return list(found) if isinstance(found, list) and all(isinstance(d, Dim) for d in found) else []

    def has(self, argument: str) -> bool:
        """Whether a tensor argument is given."""
        return isinstance(self.named.get(argument), Node)

    def tensor_of(self, value: Any) -> torch.Tensor | None:
        """The parameter or buffer that an argument reads, None where it is none."""
        found = attribute(self.module, str(value.target)) if isinstance(value, Node) and value.op == "get_attr" else None
        return found if isinstance(found, torch.Tensor) else None

    def held(self, value: Any) -> tuple[torch.Tensor, list[int]] | None:
        """The parameter or buffer that an argument is, its axes moved perhaps, and where each axis is in it."""
        if not isinstance(value, Node):
            return None
        tensor = self.tensor_of(value)
        if tensor is not None:
            return tensor, list(range(tensor.dim()))
        name = getattr(packet(value), "__name__", "")
        inner = self.held(value.args[0]) if name in _MOVED and value.args else None
        if inner is None:
            return None
        order = inner[1]
        if name == "permute":
            return inner[0], [order[d] for d in value.args[1]]  # type: ignore[union-attr, index]
        if name in ("transpose", "t", "mT", "numpy_T"):
            a, b = value.args[1:3] if name == "transpose" else (-2, -1)
            order[a], order[b] = order[b], order[a]  # type: ignore[index]
        return inner

    def constant(self, value: Any) -> int | None:
        """The number that an argument is: itself, or the only one of a buffer."""
        found = self.held(value)
        tensor = found[0] if found is not None else None
        if tensor is None or tensor.numel() != 1 or tensor.is_meta or tensor.dtype not in (torch.int32, torch.int64):
            return value if isinstance(value, int) and not isinstance(value, bool) else None
        return int(tensor)

    def tensors(self) -> Iterator[tuple[Node, Axes]]:
        """Every tensor that the node reads."""
        for node in self.node.all_input_nodes:
            found = self.known.get(node)
            if isinstance(found, list) and all(isinstance(d, Dim) for d in found):
                yield node, found

    @property
    def gives_several(self) -> bool:
        """Whether the value has several parts."""
        return isinstance(self.value, list | tuple)

    @property
    def sizes(self) -> list[int]:
        """The example's sizes of the value, of the first part where there are several."""
        return self.all_sizes[0] if self.all_sizes else []

    @property
    def all_sizes(self) -> list[list[int]]:
        """The example's sizes of each part of the value."""
        parts = self.value if isinstance(self.value, list | tuple) else [self.value]
        return [_hints(part) for part in parts if isinstance(part, torch.Tensor)]

    def number(self, name: str) -> int | None:
        """An argument that is a plain number."""
        found = self.named.get(name)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    # ---- what is found out

    def unify(self, a: Dim, b: Dim) -> Dim:
        """Make two dimensions one; where they do not fit each other, both are rigid."""
        try:
            unify(a, b)
        except Conflict as conflict:
            self.freeze([a, b], str(conflict))
        return a

    def split(self, dim: Dim, lead: int) -> tuple[Dim, Dim]:
        """Both factors of a dimension; where it cannot be split, rigid ones of these sizes."""
        try:
            return split(dim, lead)
        except Conflict as conflict:
            self.freeze([dim], str(conflict))
            return self.rigid(lead, str(conflict)), self.rigid(max(dim.size // max(lead, 1), 1), str(conflict))

    def cut(self, dim: Dim, sizes: Sequence[int]) -> Axes:
        """The parts of a dimension; where it cannot be cut so, rigid ones of these sizes."""
        try:
            return cut(dim, sizes)
        except Conflict as conflict:
            self.freeze([dim], str(conflict))
            return [self.rigid(size, str(conflict)) for size in sizes]

    def freeze(self, dims: Sequence[Dim], reason: str) -> None:
        """Note that these cannot change."""
        for dim in dims:
            dim.freeze(f"{self.node.name}: {reason}")

    def rigid(self, size: int, reason: str) -> Dim:
        """A new dimension that cannot change."""
        return Dim(size, f"{self.node.name}: {reason}")

    def literal(self, argument: str, place: int | None, dim: Dim, sign: int = 1, start: int = 0) -> None:
        """Note that a number in an argument is the size of a dimension: ``start`` + ``sign`` times it."""
        given = self.named.get(argument)
        value = given[place] if place is not None and isinstance(given, list | tuple) else given
        if not isinstance(value, int) or isinstance(value, bool) or value != start + sign * dim.size:
            return  # -1, or an end beyond the last entry
        if self.region is None:
            self.freeze([dim], "a number in code that cannot be edited")
            return
        self.notes.literals.append(Literal(self.node, argument, place, dim, self.region, sign, start))

    def computed(self, size: Any, dim: Dim) -> None:
        """Note the numbers in a size that is computed from the input's: `batch * 12` where heads lie beside the batch."""
        if not isinstance(size, Node) or size.target is not operator.mul:
            return
        numbers = {i: value for i, value in enumerate(size.args) if isinstance(value, int)}
        own, place, rest = next(self._counted(dim, numbers), (dim, None, ()))
        if place is None or self.region != "":
            reason = "it is part of a size that is computed"
            others = [self.notes.computed.setdefault((size, i), self.rigid(n, reason)) for i, n in numbers.items()]
            self.freeze([own, *others], reason)  # whatever else the same numbers are sizes of
            return
        known = self.notes.computed.setdefault((size, place), own)
        self.unify(known, own)
        self.notes.literals.append(Literal(size, str(place), None, own))
        for other in size.args if rest else ():
            self.computed(other, product(rest))

    def _counted(self, dim: Dim, numbers: Mapping[int, int]) -> Iterator[tuple[Dim, int, Sequence[Dim]]]:
        """Parts of a dimension that one of these numbers is the size of, and the others: what no input gives, else what
        stands last.
        """
        factors = list(dim.factors())
        free = [f for f in factors if f.kind != "atom" or "a size of the input" not in f.rigid]
        given = [f for f in factors if f not in free]
        for parts, rest in ((free, given), *((factors[i:], factors[:i]) for i in range(1, len(factors)))):
            own = product(parts)
            yield from ((own, i, rest) for i, value in numbers.items() if value == own.size)

    def attribute(self, path: str, name: str, dim: Dim, place: int | None = None) -> None:
        """Note that a layer's attribute, or what is at a place in it, is the size of a dimension."""
        self.notes.attributes.append(Attribute(path, name, dim, place))

    def role(self, tensor: torch.Tensor, axis: int, role: str) -> None:
        """Note what an axis of a parameter or buffer does here."""
        self.notes.place(tensor, axis, role)

    # ---- what many rules need

    def broadcast(self, given: Sequence[Axes], sizes: Sequence[int]) -> Axes:
        """The dimensions of tensors that are broadcast against each other, those of one axis made one."""
        found: list[Dim | None] = [None] * len(sizes)
        for axes in given:
            for i, dim in enumerate(axes, len(sizes) - len(axes)):
                if i < 0 or dim.size != sizes[i] or (dim.size == 1 and found[i] is not None):
                    continue
                other = found[i]
                found[i] = dim if other is None else self.unify(other, dim)
        return [d if d is not None else self.rigid(s, "no argument has it") for d, s in zip(found, sizes, strict=True)]

    def reshaped(self, axes: Sequence[Dim], sizes: Sequence[int]) -> Axes:
        """The dimensions after a reshape: axes are matched where products of sizes meet."""
        if 0 in sizes:
            return [Dim(size) for size in sizes]
        found: Axes = []
        ahead = [dim for dim in axes if dim.size != 1]
        wanted = [size for size in sizes if size != 1]
        while wanted:
            few, several = _met(ahead, wanted)
            found += self._refolded(ahead[:few], wanted[:several])
            ahead, wanted = ahead[few:], wanted[several:]
        given = iter(found)
        return [Dim(1) if size == 1 else next(given) for size in sizes]

    def _refolded(self, axes: Sequence[Dim], sizes: Sequence[int]) -> Axes:
        """The dimensions of sizes whose product is that of some axes, and of no fewer of them."""
        found: Axes = []
        ahead = list(axes)
        for size in sizes:
            taken: Axes = []
            missing = size
            while missing > 1 and ahead:
                dim = ahead.pop(0)
                if missing % dim.size == 0:
                    taken.append(dim)
                    missing //= dim.size
                elif dim.size % missing == 0:
                    first, rest = self.split(dim, missing)
                    taken.append(first)
                    ahead.insert(0, rest)
                    missing = 1
                else:
                    return self._torn(axes, sizes)
            if missing > 1:
                return self._torn(axes, sizes)
            found.append(product(taken))
        return found

    def _torn(self, axes: Sequence[Dim], sizes: Sequence[int]) -> Axes:
        reason = f"a reshape of {[d.size for d in axes]} to {list(sizes)} tears dimensions"
        self.freeze(axes, reason)
        return [self.rigid(size, reason) for size in sizes]

    def unruled(self, what: str) -> Any:
        """What nothing is known about: all dimensions rigid, those of the arguments and those of the value."""
        self.notes.unknown.setdefault(what)
        for _, axes in self.tensors():
            self.freeze(axes, f"{what} has no rule")
        parts = [[self.rigid(size, f"{what} has no rule") for size in sizes] for sizes in self.all_sizes]
        return parts if self.gives_several else parts[0] if parts else None


def _met(axes: Sequence[Dim], sizes: Sequence[int]) -> tuple[int, int]:
    """How many axes and sizes, from the first, have the same product; all of them where no fewer do."""
    few, several = 1, 1
    left, right = (axes[0].size if axes else 1), sizes[0]
    while left != right and (few < len(axes) if left < right else several < len(sizes)):
        if left < right:
            left, few = left * axes[few].size, few + 1
        else:
            right, several = right * sizes[several], several + 1
    return (few, several) if left == right else (len(axes), len(sizes))


def _hints(value: torch.Tensor) -> list[int]:
    try:
        return [hint_of(size) for size in value.shape]
    except (TypeError, ValueError, AttributeError):  # a size that depends on data has no example
        return [1 if not isinstance(size, int) else size for size in value.shape]


def parameters_of(layer: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a layer holds."""
    yield from layer.parameters()
    yield from layer.buffers()
