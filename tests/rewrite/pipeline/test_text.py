"""Pipeline text: the grammar, the round trip, and errors that point at the place."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rewrite.errors import PipelineError, RewriteError
from rewrite.pipeline.text import Element, parse, print_pipeline

names = st.from_regex(r"[A-Za-z_][\w.-]*", fullmatch=True)
options = st.lists(st.tuples(names, st.text()), unique_by=lambda pair: pair[0]).map(tuple)
pipelines = st.lists(st.builds(Element, names, options)).map(tuple)


@given(pipelines)
@example((Element("dyt", (("a", ""), ("b", "'"), ("c", "''"), ("d", "x=y {z}, 'q'\n\t\\"), ("e", "ä|\u2028"))),))
@example(())
def test_parse_inverts_print(pipeline: tuple[Element, ...]) -> None:
    assert parse(print_pipeline(pipeline)) == pipeline


@given(st.text())
def test_any_text_parses_or_is_refused_with_a_caret_inside_it(text: str) -> None:
    try:
        parse(text)
    except PipelineError as error:
        assert 0 <= error.position <= len(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" \n", ()),
        ("dyt", (Element("dyt"),)),
        ("dyt{}", (Element("dyt"),)),
        (" a , b-c.d ", (Element("a"), Element("b-c.d"))),
        ("dyt{alpha=0.8 where=blocks.*}", (Element("dyt", (("alpha", "0.8"), ("where", "blocks.*"))),)),
        (
            r"dyt{where='re:blocks\.\d{1,2}'},x",
            (Element("dyt", (("where", r"re:blocks\.\d{1,2}"),)), Element("x")),
        ),
        ("a{ k = 'it''s' }", (Element("a", (("k", "it's"),)),)),
        ("a{k=''}", (Element("a", (("k", ""),)),)),
    ],
)
def test_parse(text: str, expected: tuple[Element, ...]) -> None:
    assert parse(text) == expected


def test_values_are_quoted_only_where_needed() -> None:
    values = ("0.8", "re:a|b$", "type:LayerNorm", "a b", "a,b", "{", "it's", "", "a=b", "x\ny")
    pipeline = (Element("p", tuple((f"k{i}", value) for i, value in enumerate(values))),)
    assert print_pipeline(pipeline) == (
        "p{k0=0.8 k1=re:a|b$ k2=type:LayerNorm k3='a b' k4='a,b' k5='{' k6='it''s' k7='' k8='a=b' k9='x\ny'}"
    )


def test_positions_are_those_of_names() -> None:
    first, second = parse("a,  bc{x=1 y='2'}")
    assert (first.position, second.position) == (0, 4)
    assert (second.position_of("x"), second.position_of("y"), second.position_of("z")) == (7, 11, 4)


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("a,", "the name of a pass", 2),
        (",a", "the name of a pass", 0),
        ("a b", "','", 2),
        ("a{x=1", "an option or '}'", 5),
        ("a{x}", "'=' after option 'x'", 3),
        ("a{x=}", "option 'x' has no value; write ''", 4),
        ("a{x='1}", "never closed", 4),
        ("a{x=1,y=2}", "stands in single quotes", 5),
        ("a{x='1'2}", "stands in single quotes", 7),
        ("a{x=re:b{1}}", "stands in single quotes", 8),
        ("a{x=1 y=2 x=3}", "option 'x' is given twice", 10),
        ("a}", "','", 1),
    ],
)
def test_mistakes_show_the_text_with_a_caret(text: str, message: str, caret: int) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    first, shown, below = str(caught.value).split("\n")
    assert message in first
    assert shown == "  " + text
    assert below == "  " + " " * caret + "^"


def test_of_a_text_with_line_breaks_only_the_line_of_the_mistake_is_shown() -> None:
    with pytest.raises(PipelineError) as caught:
        parse("a{x='1\n2'},\n\tb c,\nd")
    assert str(caught.value).split("\n")[1:] == ["   b c,", "     ^"]


def test_error_survives_pickling() -> None:
    error = PipelineError("wrong", "a b", 2)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", (), "'' is no name"),
        ("a b", (), "'a b' is no name"),
        ("a", (("k=", "1"),), "'k=' is no name"),
        ("a", (("k", "1"), ("k", "2")), "given twice"),
    ],
)
def test_an_element_that_no_text_can_hold_is_refused(name: str, options: tuple[tuple[str, str], ...], message: str) -> None:
    with pytest.raises(RewriteError, match=message):
        Element(name, options)
