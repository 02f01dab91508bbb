"""Dimensions as products and sums: splitting, cutting, unifying, and where each entry of a resized one comes from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewrite.axes.dims import Conflict, Dim, concatenated, cut, product, size_of, split, unify, vector_of, written


def sizes(dims: list[Dim]) -> list[int]:
    return [dim.size for dim in dims]


def test_packed_projections_of_grouped_queries() -> None:
    """(q + k + v) viewed as kv_heads x (group + 1 + 1) x head_dim, and once more as (heads + 2 kv) x head_dim."""
    packed = Dim(48)
    lead, head_dim = split(packed, 12)
    kv, within = split(lead, 3)
    group, key, value = cut(within, [2, 1, 1])
    assert sizes([kv, group, key, value, head_dim]) == [3, 2, 1, 1, 4]
    assert sizes(packed.atoms()) == [3, 2, 1, 1, 4]
    unify(product([kv, group]), Dim(6))
    assert written(packed, {kv.root(): "kv", group.root(): "g", head_dim.root(): "d"}) == "kv x (g + 1 + 1) x d"


def test_what_is_learned_late_reaches_what_was_seen_before() -> None:
    early, late = Dim(768), Dim(768)
    unify(early, late)
    heads, head_dim = split(late, 12)
    assert [atom is other.root() for atom, other in zip(early.atoms(), (heads, head_dim), strict=True)] == [True, True]
    assert sizes(cut(heads, [4, 8])) == [4, 8]
    assert sizes(early.factors()[0].segments()) == [4, 8]


def test_products_that_meet_at_other_places_are_refined() -> None:
    a, b = product([Dim(2), Dim(6)]), product([Dim(4), Dim(3)])
    unify(a, b)
    assert sizes(a.atoms()) == [2, 2, 3]
    assert [x is y for x, y in zip(a.atoms(), b.atoms(), strict=True)] == [True] * 3


def test_a_sum_viewed_as_a_product_ties_its_parts() -> None:
    q, k, v = (Dim(8) for _ in range(3))
    three, each = split(concatenated([q, k, v]), 3)
    assert (three.size, each.size) == (3, 8)
    assert q.root() is k.root() is v.root()


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 2)), ((56,), (8, 7))])
def test_factors_that_do_not_meet(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    left, right = product(Dim(n) for n in a), product(Dim(n) for n in b)
    if a == (56,):
        unify(left, right)
        assert sizes(left.atoms()) == [8, 7]
    else:
        with pytest.raises(Conflict):
            unify(left, right)


def test_what_cannot_be() -> None:
    with pytest.raises(Conflict, match="no multiple"):
        split(Dim(10), 4)
    with pytest.raises(Conflict, match="are not 10"):
        cut(Dim(10), [4, 4])
    with pytest.raises(Conflict, match="is not"):
        unify(Dim(3), Dim(4))
    whole = Dim(12)
    _, part = split(whole, 2)
    with pytest.raises(Conflict):
        unify(part, Dim(12))


def test_reasons_and_uses_go_to_the_parts() -> None:
    dim, other = Dim(6, "an input"), product([Dim(2), Dim(3)])
    dim.use("norm")
    unify(dim, other)
    assert [(atom.rigid, atom.uses) for atom in other.atoms()] == [("an input", {"norm"})] * 2


def test_vectors() -> None:
    heads, head_dim, rest = Dim(2), Dim(3), Dim(2)
    dim = concatenated([product([heads, head_dim]), rest])
    chosen = {heads: [1, 0, -1], rest: [1]}
    assert vector_of(dim, chosen) == [3, 4, 5, 0, 1, 2, -1, -1, -1, 7]
    assert size_of(dim, chosen) == 10
    assert vector_of(dim, {}) == list(range(8))


@settings(max_examples=60)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.data())
def test_any_refinement_keeps_size_and_order(factors: list[int], data: st.DataObject) -> None:
    """However an atom is split and cut, its entries stay where they are."""
    whole = product(Dim(n) for n in factors)
    size = whole.size
    for _ in range(4):
        atom = data.draw(st.sampled_from(whole.atoms()))
        leads = [n for n in range(2, atom.size) if atom.size % n == 0]
        if leads and data.draw(st.booleans()):
            split(atom, data.draw(st.sampled_from(leads)))
        elif atom.size > 1:
            at = data.draw(st.integers(1, atom.size - 1))
            cut(atom, [at, atom.size - at])
    assert whole.size == size == size_of(whole, {})
    assert vector_of(whole, {}) == list(range(size))
