"""Matching two sequences of nodes: a true matching, and the best one where blocks of one are missing from the other."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph

from rewrite.frontend.align import Chunk, _Matcher, _opcodes

WORDS = st.lists(st.integers(0, 12), max_size=40)


def is_matching(a: list[int], b: list[int]) -> bool:
    """Whether the opcodes tile both sequences in order, and what they call equal is."""
    i = j = 0
    for tag, i1, i2, j1, j2 in _opcodes(a, b):
        if (i1, j1) != (i, j) or (tag == "equal" and a[i1:i2] != b[j1:j2]):
            return False
        i, j = i2, j2
    return (i, j) == (len(a), len(b))


def matched(codes: list[tuple[str, int, int, int, int]]) -> int:
    return sum(i2 - i1 for tag, i1, i2, _, _ in codes if tag == "equal")


@given(WORDS, WORDS)
def test_any_two_sequences(a: list[int], b: list[int]) -> None:
    assert is_matching(a, b)


@given(st.sets(st.integers(0, 200), max_size=60), st.sets(st.integers(0, 200), max_size=20))
def test_items_that_one_side_lacks_are_all_that_is_left(items: set[int], extra: set[int]) -> None:
    a, b = sorted(items | extra), sorted(items)
    assert matched(_opcodes(a, b)) == len(b)
    assert matched(_opcodes(b, a)) == len(b)


@given(WORDS)
def test_repeated_items_are_left_to_difflib(a: list[int]) -> None:
    doubled, other = [*a, *a], [*a, 99, *a]
    standard = difflib.SequenceMatcher(None, doubled, other, autojunk=False).get_opcodes()
    assert matched(_opcodes(doubled, other)) >= matched(standard) - len(a)


@pytest.mark.parametrize(
    ("span", "touched"),
    [
        ((0, 1, 0, 1), []),
        ((0, 10, 0, 10), [0]),
        ((12, 30, 12, 30), [0, 1]),
        ((21, 21, 21, 21), []),
        ((10, 10, 10, 10), [0]),
        ((0, 100, 0, 5), [0, 1, 2]),
        ((50, 60, 11, 12), [0, 1, 2]),
        ((70, 80, 70, 80), []),
    ],
)
def test_chunks_that_a_span_touches(span: tuple[int, int, int, int], touched: list[int]) -> None:
    """Those it overlaps on either side, or adjoins on both, and all between."""
    matcher = _Matcher(Graph(), Graph(), [], [], {})
    matcher.chunks = [Chunk(10, 15, 10, 15), Chunk(30, 30, 30, 35), Chunk(50, 60, 52, 52)]
    assert matcher.chunks[matcher._touching(*span)] == [matcher.chunks[k] for k in touched]
