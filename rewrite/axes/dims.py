"""Logical dimensions: atoms, ordered products and ordered sums of them, refined in place as more is learned.

A dimension of 768 that is viewed as 12 x 64 becomes the product of two atoms, one of 2304 that is split into three the sum
of three; where two turn out to be one, they are unified, part by part. What a later layer reveals so reaches every tensor
that was seen before. Products are row-major: the first factor varies slowest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

Kind = Literal["atom", "product", "sum"]
Vector = Sequence[int]
"""Where each entry of a new dimension comes from: the number of an old one, or -1 for one that is new."""


class Conflict(Exception):  # noqa: N818, not an error: what asks decides what it means
    """Two dimensions, or a dimension and its parts, do not fit each other."""


class Dim:
    """One logical dimension of ``size`` entries. ``rigid`` says why its size cannot change, "" where it can.

    ``uses`` are the ways in which an atom is worked on, such as "in" or "softmax". Two objects may stand for the same
    dimension: compare ``root()`` of them.
    """

    __slots__ = ("_parent", "kind", "parts", "rigid", "size", "uses")

    def __init__(self, size: int, rigid: str = "", kind: Kind = "atom", parts: Sequence[Dim] = ()) -> None:
        self.size = size
        self.kind: Kind = kind
        self.parts = list(parts)
        self.rigid = rigid
        self.uses: set[str] = set()
        self._parent: Dim | None = None

    def root(self) -> Dim:
        """The dimension that this one was unified with."""
        found = self
        while found._parent is not None:
            found = found._parent
        while self._parent is not None and self._parent is not found:
            self._parent, self = found, self._parent
        return found

    def atoms(self) -> list[Dim]:
        """The atoms that it is made of, in order; of size 1 only where it is one itself."""
        own = self.root()
        return [own] if own.kind == "atom" else [a for part in own.parts for a in part.atoms()]

    def factors(self) -> list[Dim]:
        """It as a product of atoms and sums, the slowest first."""
        own = self.root()
        return [f for part in own.parts for f in part.factors()] if own.kind == "product" else [own]

    def segments(self) -> list[Dim]:
        """It as a sum of atoms and products, in order."""
        own = self.root()
        return [s for part in own.parts for s in part.segments()] if own.kind == "sum" else [own]

    def freeze(self, reason: str) -> None:
        """Note that no atom of it can change its size."""
        for atom in self.atoms():
            atom.rigid = atom.rigid or reason

    def use(self, name: str) -> None:
        """Note a use of all its atoms."""
        for atom in self.atoms():
            atom.uses.add(name)

    def _become(self, kind: Kind, parts: Sequence[Dim]) -> None:
        self.kind, self.parts = kind, list(parts)

    def _link(self, other: Dim) -> None:
        self._parent = other


def product(parts: Iterable[Dim]) -> Dim:
    """The row-major product of some dimensions."""
    kept = [f for part in parts for f in part.factors() if f.size != 1]
    return kept[0] if len(kept) == 1 else Dim(math.prod(p.size for p in kept), "", "product", kept) if kept else Dim(1)


def concatenated(parts: Iterable[Dim]) -> Dim:
    """Some dimensions one after the other."""
    kept = [s for part in parts for s in part.segments() if s.size]
    return kept[0] if len(kept) == 1 else Dim(sum(p.size for p in kept), "", "sum", kept)


def split(dim: Dim, lead: int) -> tuple[Dim, Dim]:
    """A dimension as ``lead`` times the rest: both factors. Raises Conflict where its parts do not allow that."""
    own = dim.root()
    if lead == 1:
        return Dim(1), own
    if lead == own.size:
        return own, Dim(1)
    if lead <= 0 or own.size % lead:
        raise Conflict(f"{own.size} is no multiple of {lead}")
    if own.kind == "atom":
        pair = _heir(own, lead), _heir(own, own.size // lead)
        own._become("product", pair)
        return pair
    return _split_product(own, lead) if own.kind == "product" else _split_sum(own, lead)


def _heir(atom: Dim, size: int) -> Dim:
    made = Dim(size, atom.rigid)
    made.uses = set(atom.uses)
    return made


def _split_product(own: Dim, lead: int) -> tuple[Dim, Dim]:
    factors, done = own.factors(), 1
    for i, factor in enumerate(factors):
        if lead % (done * factor.size) == 0:
            done *= factor.size
            if done == lead:
                return product(factors[: i + 1]), product(factors[i + 1 :])
            continue
        if lead % done:
            break
        first, rest = split(factor, lead // done)
        return product([*factors[:i], first]), product([rest, *factors[i + 1 :]])
    raise Conflict(f"{lead} is no leading part of {' x '.join(str(f.size) for f in factors)}")


def _split_sum(own: Dim, lead: int) -> tuple[Dim, Dim]:
    """Parts one after the other, each a multiple of the same trailing factor."""
    trail, segments = own.size // lead, own.segments()
    if any(segment.size % trail for segment in segments):
        raise Conflict(f"parts of {', '.join(str(s.size) for s in segments)} are no multiples of {trail}")
    pairs = [split(segment, segment.size // trail) for segment in segments]
    for _, rest in pairs[1:]:
        unify(pairs[0][1], rest)
    leads = concatenated(first for first, _ in pairs)
    own._become("product", [leads, pairs[0][1]])
    return leads, pairs[0][1]


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    """A dimension as parts of some sizes one after the other. Raises Conflict where that is not possible."""
    own = dim.root()
    if sum(sizes) != own.size:
        raise Conflict(f"parts of {', '.join(map(str, sizes))} are not {own.size}")
    if len(sizes) == 1:
        return [own]
    if own.kind == "atom":
        parts = [_heir(own, size) for size in sizes]
        own._become("sum", parts)
        return parts
    return _cut_product(own, sizes) if own.kind == "product" else _cut_sum(own, sizes)


def _cut_product(own: Dim, sizes: Sequence[int]) -> list[Dim]:
    first, *rest = own.factors()
    trail = own.size // first.size
    if any(size % trail for size in sizes):
        raise Conflict(f"parts of {', '.join(map(str, sizes))} cut through a factor of {trail}")
    return [product([part, *rest]) for part in cut(first, [size // trail for size in sizes])]


def _cut_sum(own: Dim, sizes: Sequence[int]) -> list[Dim]:
    ahead, found = own.segments(), []
    for size in sizes:
        taken: list[Dim] = []
        while (missing := size - sum(t.size for t in taken)) > 0:
            segment = ahead.pop(0)
            if segment.size > missing:
                segment, rest = cut(segment, [missing, segment.size - missing])
                ahead.insert(0, rest)
            taken.append(segment)
        found.append(concatenated(taken) if taken else Dim(0))
    return found


def unify(a: Dim, b: Dim) -> None:
    """Make two dimensions one, part by part. Raises Conflict where their parts do not fit; some may be refined then."""
    a, b = a.root(), b.root()
    if a is b:
        return
    if a.size != b.size:
        raise Conflict(f"{a.size} is not {b.size}")
    if a.kind != "atom" and b.kind == "atom":
        a, b = b, a
    if a.kind == "atom":
        _replace(a, b)
    elif a.kind == b.kind == "product":
        _unify_factors(a, b)
    elif a.kind == b.kind == "sum":
        _unify_segments(a, b)
    else:
        _unify_mixed(*((a, b) if a.kind == "product" else (b, a)))


def _replace(atom: Dim, other: Dim) -> None:
    parts = other.atoms()
    if any(part is atom for part in parts):
        raise Conflict("a dimension would be a part of itself")
    for part in parts:
        part.rigid = part.rigid or atom.rigid
        part.uses |= atom.uses
    atom._link(other)


def _unify_factors(a: Dim, b: Dim) -> None:
    left, right = a.factors(), b.factors()
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size:
            x, rest = split(x, y.size)
            left.insert(0, rest)
        elif y.size > x.size:
            y, rest = split(y, x.size)
            right.insert(0, rest)
        unify(x, y)
    if a.root() is not b.root():
        a.root()._link(b.root())


def _unify_segments(a: Dim, b: Dim) -> None:
    ends = sorted({*itertools.accumulate(s.size for s in a.segments()), *itertools.accumulate(s.size for s in b.segments())})
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    for x, y in zip(cut(a, sizes), cut(b, sizes), strict=True):
        unify(x, y)
    if a.root() is not b.root():
        a.root()._link(b.root())


def _unify_mixed(whole: Dim, sums: Dim) -> None:
    """A product with a sum: the sum's parts have a trailing factor in common, or the product's first factor is cut."""
    try:
        split(sums, whole.factors()[0].size)
    except Conflict:
        sizes = [segment.size for segment in sums.segments()]
        for x, y in zip(cut(whole, sizes), sums.segments(), strict=True):
            unify(x, y)
        if whole.root() is not sums.root():
            whole.root()._link(sums.root())
        return
    unify(whole, sums)


def vector_of(dim: Dim, chosen: Mapping[Dim, Vector]) -> list[int]:
    """Where each entry of a dimension comes from once its atoms are resized; ``chosen`` gives those of changed atoms."""
    own = dim.root()
    if own.kind == "atom":
        return list(chosen.get(own, range(own.size)))
    if own.kind == "sum":
        found, start = [], 0
        for part in own.parts:
            found += [start + i if i >= 0 else -1 for i in vector_of(part, chosen)]
            start += part.size
        return found
    found = [0]
    for part in own.parts:
        inner = vector_of(part, chosen)
        found = [i * part.size + j if i >= 0 and j >= 0 else -1 for i in found for j in inner]
    return found


def size_of(dim: Dim, chosen: Mapping[Dim, Vector]) -> int:
    """The size of a dimension once its atoms are resized."""
    own = dim.root()
    if own.kind == "atom":
        return len(chosen[own]) if own in chosen else own.size
    sizes = (size_of(part, chosen) for part in own.parts)
    return sum(sizes) if own.kind == "sum" else math.prod(sizes)


def written(dim: Dim, names: Mapping[Dim, str]) -> str:
    """A dimension in words: `3 x heads.0 x head_dim.0`, `(q.0 + k.0)`."""
    own = dim.root()
    if own.kind == "atom":
        return names.get(own, str(own.size))
    between = " x " if own.kind == "product" else " + "
    text = between.join(written(part, names) for part in own.parts)
    return f"({text})" if own.kind == "sum" else text
