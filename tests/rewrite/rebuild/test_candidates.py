"""Settings as a tree, and which edits of them observed sizes speak for."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from rewrite.rebuild.candidates import Edit, Observed, Sizes, candidates, patterns
from rewrite.rebuild.settings import edited, leaves, written

BEFORE = {"h.0.up": (8, 4), "h.0.down": (4, 8), "h.1.up": (8, 4), "h.1.down": (4, 8)}
GROWN = {name: tuple(16 if size == 8 else size for size in shape) for name, shape in BEFORE.items()}
DEEPER = {**BEFORE, "h.2.up": (8, 4), "h.2.down": (4, 8)}


@dataclass(frozen=True)
class Inner:
    width: int = 8
    name: str = "x"


def test_leaves_and_copies_of_nested_settings() -> None:
    tree = {"inner": Inner(), "depths": (1, 2), "plain": SimpleNamespace(rate=0.5, on=True, other=None)}
    found = {written(path): value for path, value in leaves(tree)}
    assert found == {
        "inner.width": 8,
        "depths": (1, 2),
        "depths[0]": 1,
        "depths[1]": 2,
        "plain.rate": 0.5,
        "plain.other": None,
    }
    made = edited(tree, {("inner", "width"): 9, ("depths", 1): 7, ("plain", "other"): 3})
    assert (made["inner"], made["depths"], made["plain"].other) == (Inner(9), (1, 7), 3)
    assert tree["inner"] == Inner()
    assert tree["depths"] == (1, 2)


def test_what_was_observed() -> None:
    assert Observed.between(BEFORE, GROWN).sizes == {(8, 16)}
    assert Observed.between(BEFORE, DEEPER).counts == {(2, 3)}
    assert patterns(DEEPER) == {"h.*.up", "h.*.down"}


def test_a_size_a_ratio_a_count_and_a_list() -> None:
    found = candidates(
        {("ffn",): 8, ("heads",): 3, ("ratio",): 2.0, ("none",): None}, Observed.between(BEFORE, GROWN), Sizes()
    )
    assert {str(edit) for edit in found} == {"ffn=16", "heads=6", "ratio=4.0", "ratio=1.0", "none=16"}
    assert found[0] == Edit(("ffn",), 16)
    kinds = ("full", "slide")
    deeper = candidates({("layers",): 2, ("kinds",): kinds}, Observed.between(BEFORE, DEEPER), Sizes())
    assert {str(edit) for edit in deeper} == {
        "layers=3",
        "layers=3, kinds=('full', 'slide', 'full')",
        "layers=3, kinds=('full', 'slide', 'slide')",
        "kinds=('full', 'slide', 'full')",
        "kinds=('full', 'slide', 'slide')",
    }
