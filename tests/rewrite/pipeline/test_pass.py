"""Passes: options from text and from Python, the text of a pass, its JSON and its description."""

from __future__ import annotations

import enum
import math
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.errors import OptionError, RewriteError
from rewrite.pipeline.pass_ import OptionDescription, Pass, describe, option
from rewrite.pipeline.select import Selector
from rewrite.pipeline.text import parse


class Round(enum.Enum):
    NEAREST = "nearest"
    UP = "up"


class Bits(enum.IntEnum):
    TWO = 2
    FOUR = 4


class Base(Pass):
    def contract(self) -> Any: ...

    def run(self, program: Any, context: Any) -> None: ...


@dataclass(frozen=True)
class Example(Base):
    """Do one thing: y = x.

    More about it.
    """

    name: ClassVar[str] = "example"
    alpha: float = option(0.5, "value at the start")
    count: int = 3
    fast: bool = False
    label: str = ""
    where: Selector = Selector("*")
    mode: Literal["mean", "sum", 2] = "mean"
    rounding: Round = Round.NEAREST
    bits: Bits = Bits.TWO
    limit: float | None = None
    only: Selector | None = None


@dataclass(frozen=True)
class Plain(Base):
    name = "plain"


selectors = st.sampled_from(["*", "a.*|!b", "re:a|b{1,2}", "type:LayerNorm"]).map(Selector)
passes = st.builds(
    Example,
    alpha=st.floats(allow_nan=False),
    count=st.integers(),
    fast=st.booleans(),
    label=st.text(),
    where=selectors,
    mode=st.sampled_from(["mean", "sum", 2]),
    rounding=st.sampled_from(Round),
    bits=st.sampled_from(Bits),
    limit=st.none() | st.floats(allow_nan=False),
    only=st.none() | selectors,
)


@given(passes)
def test_text_to_pass_is_a_round_trip(pass_: Example) -> None:
    (element,) = parse(pass_.text)
    assert Example.from_options(dict(element.options)) == pass_
    assert Example.from_options(dict(element.options)).text == pass_.text


def test_text_shows_what_differs_from_the_defaults() -> None:
    assert Example().text == "example"
    assert Example(alpha=1, fast=True, only=Selector("a b")).text == "example{alpha=1.0 fast=true only='a b'}"
    assert Example(limit=0.1, bits=Bits.FOUR, rounding=Round.UP, mode=2).text == (
        "example{mode=2 rounding=up bits=FOUR limit=0.1}"
    )
    assert Plain().text == "plain"


def test_not_a_number_is_told_from_numbers() -> None:
    assert Example(alpha=math.nan).text == "example{alpha=nan}"


def test_values_from_python_are_normalized() -> None:
    made = Example(alpha=2, where="a.*", mode="sum", rounding="up")  # type: ignore[arg-type]
    assert (type(made.alpha), made.where, made.rounding) == (float, Selector("a.*"), Round.UP)
    assert replace(made, alpha=3).alpha == 3.0
    with pytest.raises(FrozenInstanceError):
        made.count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("alpha", "1e-3", 0.001),
        ("alpha", "inf", math.inf),
        ("count", "-2", -2),
        ("fast", "true", True),
        ("label", "none", "none"),
        ("mode", "2", 2),
        ("limit", "none", None),
        ("limit", "2", 2.0),
        ("only", "re:a", Selector("re:a")),
    ],
)
def test_options_from_text(name: str, text: str, value: object) -> None:
    assert getattr(Example.from_options({name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("alpha", "fast", "option 'alpha' of pass 'example' expects float, got 'fast'"),
        ("count", "1.5", "expects int"),
        ("fast", "True", "expects true or false"),
        ("mode", "median", "expects one of mean, sum, 2"),
        ("rounding", "UP", "expects one of nearest, up"),
        ("bits", "2", "expects one of TWO, FOUR"),
        ("limit", "None", "expects float or none"),
        ("where", "re:(", "option 'where' of pass 'example': selector 're:\\('"),
        ("alhpa", "1", "pass 'example' has no option 'alhpa'; did you mean 'alpha'"),
        ("zzz", "1", "has no option 'zzz'; it has alpha, count"),
    ],
)
def test_a_wrong_option_is_named(name: str, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Example.from_options({name: text})
    assert caught.value.option == name


def test_a_pass_without_options_says_so() -> None:
    with pytest.raises(OptionError, match="'plain' has no option 'a'; it has none"):
        Plain.from_options({"a": "1"})


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": "0.5"},
        {"alpha": True},
        {"alpha": 10**400},
        {"count": 1.0},
        {"count": True},
        {"fast": 1},
        {"label": None},
        {"where": 3},
        {"mode": "median"},
        {"mode": 2.0},
        {"mode": []},
        {"limit": "1"},
    ],
)
def test_a_wrong_value_from_python_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option '{next(iter(values))}' of pass 'example' expects"):
        Example(**values)


def test_options_are_json_values() -> None:
    assert Example(alpha=math.inf, limit=0.25, fast=True).options() == {
        "alpha": "inf",
        "count": 3,
        "fast": True,
        "label": "",
        "where": "*",
        "mode": "mean",
        "rounding": "nearest",
        "bits": "TWO",
        "limit": 0.25,
        "only": None,
    }


def test_description() -> None:
    about = describe(Example)
    assert (about.name, about.summary) == ("example", "Do one thing: y = x.")
    assert about.doc == "Do one thing: y = x.\n\nMore about it."
    assert about.options[0] == OptionDescription("alpha", "float", "0.5", 0.5, "value at the start")
    assert [(o.type, o.default) for o in about.options[1:]] == [
        ("int", "3"),
        ("true or false", "false"),
        ("text", ""),
        ("selector", "*"),
        ("one of mean, sum, 2", "mean"),
        ("one of nearest, up", "nearest"),
        ("one of TWO, FOUR", "TWO"),
        ("float or none", "none"),
        ("selector or none", "none"),
    ]


def test_the_signature_that_a_dataclass_makes_is_no_documentation() -> None:
    assert (describe(Plain).summary, describe(Plain).doc) == ("", "")


def test_a_text_that_would_read_as_none_is_refused() -> None:
    with pytest.raises(OptionError, match="stands for no value"):
        Example(only=Selector("none")).text  # noqa: B018


def test_a_class_that_breaks_the_rules_is_refused() -> None:
    class Undecorated(Base):
        name = "undecorated"

    @dataclass
    class Thawed:
        """Not frozen."""

    @dataclass(frozen=True)
    class Listed(Base):
        name = "listed"
        values: list[int] | None = None

    @dataclass(frozen=True)
    class Defaultless(Base):
        name = "defaultless"
        alpha: float

    @dataclass(frozen=True)
    class Clashing(Base):
        name = "clashing"
        text: str = ""  # type: ignore[assignment]

    for pass_class, message in [
        (Undecorated, "must be decorated with @dataclass"),
        (Listed, "option 'values' of pass class Listed: .* is no type of an option"),
        (Defaultless, "option 'alpha' of pass class Defaultless needs a default"),
        (Clashing, "option 'text' .* rename it"),
    ]:
        with pytest.raises(RewriteError, match=message):
            describe(pass_class)
