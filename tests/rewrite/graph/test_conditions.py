"""Conditions on sizes: what the grammar reads, what it makes of it, what it refuses at once."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from rewrite.graph.conditions import Condition, conditions
from rewrite.graph.expressions import read_expression

SIZES = {"s0_0": 6, "s0_1": 4, "s1_0": 0}
#: Text to what Python makes of it.
READ = (
    *(
        "s0_0 <= 16",
        "s0_0 * 2 + 1 == 13",
        "s0_0 - 2 - 1 == 3",
        "2 ** 3 == 8",
        "-s0_0 ** 2 == -36",
        "s0_0 // 4 % 2 == 1",
    ),
    *("1 < s0_1 <= 4 < s0_0", "not s0_0 == 6 or s0_1 == 4", "not (s0_0 == 6 or s0_1 == 4)", "s0_0 > 7 and s0_0 // s1_0 > 1"),
    *("s0_0 == 6 or s0_0 // s1_0 > 1", "(s0_0 + 3) // 4 >= 2", "--s0_0 == +6", "s0_0 != s0_1"),
)


@pytest.mark.parametrize("text", READ)
def test_it_means_what_it_means_in_python(text: str) -> None:
    assert Condition(text, text).check()(SIZES) == bool(eval(text, {}, dict(SIZES)))


def test_a_division_by_nothing_does_not_hold() -> None:
    assert not Condition("s0_0 // s1_0 > 1", "").check()(SIZES)


REFUSED = (
    *(
        "",
        "1 +",
        "s0_0 s0_1",
        "print(s0_0)",
        "s0_0.real",
        "[1]",
        "'a' == 'a'",
        "1.5 > s0_0",
        "lambda: 1",
        "s0_0 << 9",
        "a := 1",
    ),
    *(
        "9**9**9**9",
        "s0_0 ** s0_0",
        "((s0_0**8)**8)**8 > 1",
        "*".join(["s0_0"] * 90),
        "(" * 500 + "1" + ")" * 500,
        "-" * 5000 + "1",
    ),
    *("1 + " * 5000 + "1", "9" * 5000, "ſ0 > 1", "s0_0 > 1\n; import os", "`1`", "s0_0 if 1 else 2", "s0_0 is 1"),
)


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a condition"):
        Condition(text, "").check()


def test_guards_of_an_export_become_conditions() -> None:
    found = conditions(["L['x'].size()[1] <= 16", "L['y'].size()[0] > 1", "L['x'].foo > 1", "L['x'].size()[0]**x"], {"x": 2})
    assert [(c.expression, c.words) for c in found] == [("s2_1 <= 16", "x.size(1) <= 16")]
    assert found[0].names() == {"s2_1"}


@hypothesis.given(st.text(alphabet="s01_ ()+-*/%<>=!andornt.'\",", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_expression(text)
    except ValueError:
        return
    assert all(part.height <= 100 for part in read_expression(text).walk())
