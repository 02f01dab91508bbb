"""Finding the settings with which a class has a program's shapes and computes what it computes.

Best first over sets of edits: each is built without values and scored by how many sizes and names are wrong; a set that
fails to build keeps its parent's score, since a partner may mend it. Of those that have the right shapes the outputs
decide, on parameters drawn at random: what computes something else is built upon like the others, by edits that leave
shapes alone, except those that leave the outputs alone too.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewrite.errors import RewriteError
from rewrite.lowering.compared import Distance

from .candidates import Edit, Observed, Sizes, candidates, patterns
from .makers import Maker
from .settings import Path
from .skeleton import Shapes, shapes_built

STAGES = ((2, 100), (9, 400))
"""Up to which rank edits are tried, and how many models are built at most until then."""
_USEFUL, _OTHER, _RANK = 0.02, 0.3, 0.01
"""What an edit costs beside the share of the sizes that it leaves wrong: one that mends sizes, another one, each rank."""

Edits = Mapping[Path, Any]
Differs = Callable[[Edits], Distance]


def fitting(maker: Maker, before: Shapes, after: Shapes, sizes: Sizes, differs: Differs) -> Edits:
    """The edits with which the class has the shapes ``after``, and which ``differs`` from the program in nothing.

    ``before`` are the shapes of the user's model, ``sizes`` what else settings could be.
    Raises RewriteError, with what is nearest, where there are none.
    """
    plain = shapes_built(lambda: maker.build({}))
    if plain is None:
        raise RewriteError("its class cannot be built again with its own settings")
    strange = sorted(patterns(after) ^ patterns(plain))
    if strange:
        raise RewriteError(f"its class has {'' if strange[0] in patterns(plain) else 'no place for '}{strange[0]}")
    mine, theirs = Observed.between(plain, after), Observed.between(before, after)
    every = candidates(maker.settings, Observed(mine.sizes | theirs.sizes, mine.counts | theirs.counts), sizes)
    search = _Search(maker, plain, after, differs)
    for rank, most in STAGES:
        edits = [edit for edit in every if edit.rank <= rank]
        base = search.effective(edits) if rank > STAGES[0][0] else ()
        found = search.run(edits, base, most)
        if found is not None:
            return found
    raise RewriteError(search.why())


def wrong(shapes: Shapes | None, target: Shapes) -> int | None:
    """How many sizes and names are not those of the target; None without shapes."""
    if shapes is None:
        return None
    total = 0
    for name in {*shapes, *target}:
        one, other = shapes.get(name), target.get(name)
        if one is None or other is None or len(one) != len(other):
            total += 1 + len(one or other or ())
        else:
            total += sum(a != b for a, b in zip(one, other, strict=True))
    return total


@dataclass
class _Search:
    """What has been tried: how many sizes each set of edits leaves wrong, and how the outputs of the right ones differ."""

    maker: Maker
    plain: Shapes
    target: Shapes
    differs: Differs
    scores: dict[frozenset[Edit], int | None] = field(default_factory=dict)
    neutral: set[frozenset[Edit]] = field(default_factory=set)
    refused: dict[frozenset[Edit], Distance] = field(default_factory=dict)
    nearest: tuple[int, str] = (10**9, "")

    def effective(self, edits: Sequence[Edit]) -> tuple[Edit, ...]:
        """What settings that are not given are in effect: the one value that leaves all shapes as they are, where others
        do not.
        """
        found = []
        for path in dict.fromkeys(edit.path for edit in edits if edit.fills):
            own = [edit for edit in edits if edit.path == path]
            for edit in own:
                self.score([edit])
            kept = [edit for edit in own if frozenset([edit]) in self.neutral]
            found += kept if len(kept) == 1 < len(own) else []
        return tuple(found)

    def run(self, edits: Sequence[Edit], base: Sequence[Edit], most: int) -> Edits | None:
        """The first set of edits beside those of ``base`` that fits; None where none of the first ``most`` does."""
        start = self.score(base) or 0
        gain = {edit: start - (start if (s := self.score([*base, edit])) is None else s) for edit in edits} if start else {}
        order = sorted(self.alive(edits, base), key=lambda edit: (-gain.get(edit, 0), edit.rank))
        number, idle = itertools.count(), set[Edit]()
        heap: list[tuple[float, int, tuple[Edit, ...], int]] = [(0.0, next(number), (), start)]
        seen: set[frozenset[Edit]] = set()
        while heap and len(self.scores) + len(self.refused) < most:
            _, _, chosen, parent = heapq.heappop(heap)
            if idle.intersection(chosen) or frozenset(chosen) in seen:
                continue
            seen.add(frozenset(chosen))
            score = self.score([*base, *chosen])
            score = parent if score is None else score
            if score == 0 and self.tried(base, chosen, idle):
                return _as_edits([*base, *chosen])
            for edit in order:
                if edit not in idle and not any(_overlap(edit, other) for other in chosen):
                    left = max(score - gain.get(edit, 0), 0) / max(start, 1)
                    price = sum(_USEFUL if gain.get(e, 0) > 0 else _OTHER for e in (*chosen, edit))
                    price += _RANK * sum(e.rank for e in (*chosen, edit))
                    heapq.heappush(heap, (left + price, next(number), (*chosen, edit), score))
        return None

    def alive(self, edits: Sequence[Edit], base: Sequence[Edit]) -> list[Edit]:
        """The edits without those of settings that were not given and take no number, or that no shape depends on."""
        found: list[Edit] = []
        for edit in edits:
            own = [other for other in edits if other.path == edit.path]
            if not edit.fills or any(self.scores.get(frozenset([*base, e])) != self.scores[frozenset(base)] for e in own):
                found += [] if edit.fills and self.scores.get(frozenset([*base, edit])) is None else [edit]
        return found

    def score(self, chosen: Sequence[Edit]) -> int | None:
        """How many sizes and names some edits leave wrong; None where nothing can be built with them."""
        key = frozenset(chosen)
        if key not in self.scores:
            shapes = shapes_built(lambda: self.maker.build(_as_edits(chosen)))
            self.scores[key] = found = wrong(shapes, self.target)
            if shapes == self.plain:
                self.neutral.add(key)
            if shapes is not None and found is not None and found < self.nearest[0]:
                self.nearest = (found, _first_wrong(shapes, self.target))
        return self.scores[key]

    def tried(self, base: Sequence[Edit], chosen: Sequence[Edit], idle: set[Edit]) -> bool:
        """Whether the outputs are right. An edit that leaves wrong ones as wrong as they were is idle."""
        key = frozenset([*base, *chosen])
        if key not in self.refused:
            found = self.differs(_as_edits([*base, *chosen]))
            if not found.words:
                return True
            self.refused[key] = found
        if chosen and self.refused.get(key - {chosen[-1]}) == self.refused[key]:
            idle.add(chosen[-1])
        return False

    def why(self) -> str:
        """Why nothing was found, in words."""
        if self.refused:
            chosen, found = min(self.refused.items(), key=lambda item: item[1].error)
            words = ", ".join(sorted(map(str, chosen))) or "its own ones"
            return f"no settings of its class compute the same: with {words} it differs {found.words}"
        return f"no settings of its class give its sizes: {self.nearest[1] or 'none of them can be changed'}"


def _overlap(one: Edit, other: Edit) -> bool:
    return any(a[: len(b)] == b[: len(a)] for a in one.values for b in other.values)


def _as_edits(chosen: Sequence[Edit]) -> dict[Path, Any]:
    return {path: value for edit in chosen for path, value in edit.values.items()}


def _first_wrong(shapes: Shapes, target: Shapes) -> str:
    for name in target:
        if name not in shapes:
            return f"there is no {name}"
        if shapes[name] != target[name]:
            return f"{name} would be {shapes[name]}, and is {target[name]}"
    return f"{next((name for name in shapes if name not in target), 'nothing')} would be there"
