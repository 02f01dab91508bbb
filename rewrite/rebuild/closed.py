"""Blocks that are gone leave gaps among the numbers of the others, which a class that is built anew does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Closed:
    """The numbers of which nothing is left, by what stands before them in a name."""

    missing: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, before: Iterable[str], after: Iterable[str]) -> Closed:
        """The gaps among names ``after`` that were none ``before``."""
        old, new = numbers_of(before), numbers_of(after)
        gaps = {place: frozenset(those - new[place]) for place, those in old.items() if place in new}
        return cls({place: those for place, those in gaps.items() if those})

    def name(self, name: str) -> str:
        """A name with its numbers moved up to where there is no gap."""

        def moved(match: re.Match[str]) -> str:
            number = int(match[0])
            return str(number - sum(other < number for other in self.missing.get(name[: match.start()], ())))

        return NUMBER.sub(moved, name)

    @property
    def gone(self) -> tuple[int, ...]:
        """The numbers that are gone, where it is the same ones everywhere."""
        found = {*self.missing.values()}
        return tuple(sorted(found.pop())) if len(found) == 1 else ()


def numbers_of(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers in names, by what stands before them."""
    found: dict[str, set[int]] = {}
    for name in names:
        for match in NUMBER.finditer(name):
            found.setdefault(name[: match.start()], set()).add(int(match[0]))
    return found
