"""Which settings could make a model's sizes those of a program: those whose value was an old size, or is a part of one.

Nothing is known of architectures. Where shapes went from o to n, a setting of o may become n, and one of v may become
v n/o, as a number of heads does; a list goes along as a whole, or entry by entry; where there are more layers, a count and
the lists of that length follow; a setting that is None, or asked for and not there, may be any new size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .closed import NUMBER, numbers_of
from .settings import Path, is_number, written
from .skeleton import Shapes


@dataclass(frozen=True)
class Edit:
    """Another value for one setting; the lower the ``rank`` the sooner it is tried. One that ``fills`` was not given.

    ``more`` are lists that follow a count: some classes are built with neither of the two alone.
    """

    path: Path
    value: Any = field(hash=False)
    rank: int = 0
    fills: bool = False
    more: tuple[tuple[Path, Any], ...] = field(default=(), hash=False)

    @property
    def values(self) -> dict[Path, Any]:
        """Every setting that it changes, with its value."""
        return {self.path: self.value, **dict(self.more)}

    def __str__(self) -> str:
        return ", ".join(f"{written(path)}={value}" for path, value in self.values.items())


@dataclass(frozen=True)
class Observed:
    """What changed between two sets of shapes: sizes and counts of layers, as pairs of old and new."""

    sizes: frozenset[tuple[int, int]]
    counts: frozenset[tuple[int, int]]

    @classmethod
    def between(cls, before: Shapes, after: Shapes) -> Observed:
        sizes = {
            (o, n)
            for name, shape in before.items()
            if name in after and len(after[name]) == len(shape)
            for o, n in zip(shape, after[name], strict=True)
            if o != n
        }
        old, new = _counts(before), _counts(after)
        return cls(frozenset(sizes), frozenset((old[k], new[k]) for k in old.keys() & new.keys() if old[k] != new[k]))

    @property
    def ratios(self) -> list[Fraction]:
        """The distinct ratios of new to old, the most frequent first."""
        found = Counter(Fraction(n, o) for o, n in self.sizes | self.counts if o)
        return [ratio for ratio, _ in found.most_common()]


@dataclass(frozen=True)
class Sizes:
    """What else a setting may be: one that is not given a size of the program's ``dimensions``, another one a size of its
    ``inputs``, such as that of images; a list that says something of each layer lacks those that are ``gone``.
    """

    dimensions: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()


def patterns(shapes: Shapes) -> set[str]:
    """The names with a star for every number in them."""
    return {NUMBER.sub("*", name) for name in shapes}


def _counts(shapes: Shapes) -> dict[str, int]:
    """How many numbers there are at each place of a name that has one: how many layers."""
    return {f"{place}*": len(numbers) for place, numbers in numbers_of(shapes).items()}


def candidates(settings: Mapping[Path, Any], seen: Observed, sizes: Sizes) -> list[Edit]:
    """Every edit of one setting that the observed sizes, and the others, speak for."""
    found: dict[str, Edit] = {}
    for path, value in settings.items():
        for edit in (*_for_one(path, value, seen, sizes), *_together(path, value, settings, seen, sizes)):
            if repr(edit.value) != repr(value):
                found.setdefault(repr(edit.values), edit)
    return sorted(found.values(), key=lambda edit: edit.rank)


def _for_one(path: Path, value: Any, seen: Observed, sizes: Sizes) -> Iterator[Edit]:
    if value is None:
        yield from (Edit(path, n, 1, True) for _, n in sorted(seen.sizes))
        yield from (Edit(path, n, 3, True) for n in sizes.dimensions)
    elif isinstance(value, list | tuple):
        yield from _for_list(path, value, seen, sizes)
    elif isinstance(value, float):
        yield from (Edit(path, value * float(factor), 1) for r in seen.ratios for factor in (r, 1 / r))
    else:
        yield from (Edit(path, n) for o, n in sorted(seen.sizes | seen.counts) if o == value)
        yield from (Edit(path, int(value * r), 1) for r in seen.ratios if (value * r).denominator == 1)
        yield from (Edit(path, value + n - o, 2) for o, n in sorted(seen.counts) if value + n - o > 0)
        yield from (Edit(path, n, 4) for n in sizes.inputs if value > 1)


def _together(path: Path, value: Any, settings: Mapping[Path, Any], seen: Observed, sizes: Sizes) -> Iterator[Edit]:
    """A count of layers with all lists of that length."""
    for o, n in sorted(seen.counts):
        lists = [(p, v) for p, v in settings.items() if isinstance(v, list | tuple) and len(v) == o]
        if value == o and is_number(value) and lists:
            longer = [[(p, type(v)(made)) for made in _lengthened(v, n, sizes.gone)] for p, v in lists]
            yield from (Edit(path, n, 1, more=tuple(own)) for own in zip(*longer, strict=True))


def _for_list(path: Path, value: list[Any] | tuple[Any, ...], seen: Observed, sizes: Sizes) -> Iterator[Edit]:
    kind = type(value)
    if all(map(is_number, value)):
        for r in seen.ratios:
            scaled = [v * r if isinstance(v, int) else v * float(r) for v in value]
            if all(not isinstance(v, Fraction) or v.denominator == 1 for v in scaled):
                yield Edit(path, kind(int(v) if isinstance(v, Fraction) else v for v in scaled), 1)
        if len(set(value)) == 1 and isinstance(value[0], int):
            yield from (Edit(path, kind([n] * len(value)), 4) for n in sizes.inputs)
    for o, n in sorted(seen.counts):
        if len(value) == o:
            yield from (Edit(path, kind(longer), 1) for longer in _lengthened(value, n, sizes.gone))


def _lengthened(value: Sequence[Any], length: int, gone: Collection[int]) -> Iterator[list[Any]]:
    """A list that says something of each layer, for another number of them: without those that are gone, or its period goes
    on, or its end.
    """
    left = [item for i, item in enumerate(value) if i not in gone]
    if len(left) == length:
        yield left
        return
    period = next(p for p in range(1, len(value) + 1) if all(value[i] == value[i % p] for i in range(len(value))))
    yield [value[i % period] for i in range(length)]
    yield [value[min(i, len(value) - 1)] for i in range(length)]
