"""Rounding in few digits: the new form's errors against the old one's of the same kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewrite.graph.maps import ParameterMap
from rewrite.proof.form import Outcome
from rewrite.proof.judge import excess, gap

EPS = 2.0**-7


def outcome(x: float, w: float, name: str = "w", **rest: Any) -> Outcome:
    """Gradients of an input, of size 1, and of a weight, of size 100."""
    gradients: dict[str, torch.Tensor | None] = {"x": torch.tensor([1.0, x]), name: torch.tensor([100.0, w])}
    return Outcome([], [], gradients, **rest)


@pytest.mark.parametrize(("x", "w", "too_far"), [(0.4, 3.0, False), (2.5, 3.0, True), (0.4, 50.0, True)])
def test_gradients_are_held_against_old_ones_of_the_same_kind(x: float, w: float, too_far: bool) -> None:
    """An input's gradient, which jumps at a ReLU's kink in both forms, beside one of a new weight that is far larger."""
    truth, old = outcome(0.0, 0.0), outcome(0.4, 3.0)
    new, own = outcome(x, w, "new itself", sources=frozenset({"w"})), outcome(0.0, 0.0, "new itself")
    assert (excess(truth, old, new, own, EPS).gradients > 0) == too_far


def test_a_parameter_that_follows_from_none_is_promised_nothing() -> None:
    truth, old, own = outcome(0.0, 0.0), outcome(0.4, 3.0), outcome(0.0, 0.0, "router")
    new = outcome(0.4, 50.0, "router", sources=frozenset({"w"}))
    assert not excess(truth, old, new, own, EPS).gradients


@pytest.mark.parametrize(("own", "new", "too_far"), [(2.0, 5.0, False), (2.5, 1.0, True)])
def test_what_no_old_entry_flows_into_is_a_new_channel_s_own(own: float, new: float, too_far: bool) -> None:
    """A running variance with one channel more, which the map begins at 1."""
    made = ParameterMap(lambda old: torch.cat([old, old.new_ones(1)]), ("var",))
    old = Outcome([], [], {}, {"var": torch.tensor([2.0])})
    grown = Outcome([], [], {}, followed={"var": (made, torch.tensor([own, new]))})
    assert (gap(old, grown).state > 0) == too_far


def test_a_buffer_that_begins_anew_is_held_as_it_begins() -> None:
    made = ParameterMap(lambda old: torch.zeros_like(old), ("mean",))
    old = Outcome([], [], {}, {"mean": torch.tensor([2.0])})
    assert gap(old, Outcome([], [], {}, followed={"mean": (made, torch.tensor([3.0]))})).state > 0


@pytest.mark.parametrize(("size", "too_far"), [(1e-34, False), (1e-20, True)])
def test_numbers_that_lose_their_digits_are_left_to_exact_arithmetic(size: float, too_far: bool) -> None:
    """Half an output is off: at 1e-34, what it was made of may have had no digit left."""
    truth, old = (Outcome([torch.tensor([size], dtype=dtype)], []) for dtype in (torch.float64, torch.float32))
    new = Outcome([torch.tensor([size / 2])], [])
    assert (excess(truth, old, new, truth, EPS).outputs > 0) == too_far
