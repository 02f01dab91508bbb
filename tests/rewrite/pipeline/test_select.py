"""Selectors: globs, types, regular expressions, negation, and their errors."""

from __future__ import annotations

import contextlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.errors import RewriteError
from rewrite.pipeline.select import Selector

NORM = ("LayerNorm", "LayerNorm2d", "timm.layers.norm.LayerNorm2d")


@pytest.mark.parametrize(
    ("text", "path", "matches"),
    [
        ("*", "", True),
        ("*", "blocks.0.norm1", True),
        ("blocks.*.norm1", "blocks.0.norm1", True),
        ("blocks.*.norm1", "blocks.0.inner.norm1", True),
        ("blocks.*.norm1", "blocks.0.norm10", False),
        ("blocks.*.norm1", "encoder.blocks.0.norm1", False),
        ("blocks.?.norm1", "blocks.10.norm1", False),
        ("blocks.[01].norm1", "blocks.1.norm1", True),
        ("blocks.[!01].norm1", "blocks.1.norm1", False),
        ("Blocks.*", "blocks.0", False),
        ("head|norm", "norm", True),
        ("head | norm", "norm", True),
        ("head|norm", "fc", False),
        ("!head", "norm", True),
        ("!head", "head", False),
        ("blocks.*|!*.norm2", "blocks.0.norm2", False),
        ("!*.norm2|blocks.*", "blocks.0.norm1", True),
        ("!*.norm2|blocks.*", "head", False),
        (r"re:norm[12]$", "blocks.0.norm1", True),
        (r"re:norm[12]$", "blocks.0.norm3", False),
        (r"re:^a$|^b$", "b", True),
        (r"head|re:^a$|^b$", "head", True),
        (r"*|!re:^a$|^b$", "b", False),
        (r"re:", "x", None),
        ("re: x", " x", True),
        ("re: x", "x", False),
    ],
)
def test_matching_of_paths(text: str, path: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(RewriteError):
            Selector(text)
    else:
        assert Selector(text).matches(path) is matches


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("type:LayerNorm", True),
        ("type:LayerNorm2d", True),
        ("type:Layer", False),
        ("type:*Norm*", True),
        ("type:timm.*", True),
        ("type:layernorm", False),
        ("!type:LayerNorm", False),
        ("type:BatchNorm*|type:LayerNorm", True),
        ("type:LayerNorm|!blocks.*", False),
        ("blocks.*|!type:Linear", True),
    ],
)
def test_matching_of_types(text: str, matches: bool) -> None:
    assert Selector(text).matches("blocks.0.norm1", NORM) is matches


def test_a_type_term_matches_nothing_where_no_type_is_given() -> None:
    assert not Selector("type:*").matches("blocks.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a|", "empty"),
        ("|a", "empty"),
        ("!", "empty"),
        ("!!a", "doubly negated"),
        ("type:", "empty"),
        ("re:(", "bad regular expression"),
        ("typ:LayerNorm", "'typ:' starts no term"),
    ],
)
def test_errors_name_the_selector(text: str, message: str) -> None:
    with pytest.raises(RewriteError, match=message) as caught:
        Selector(text)
    assert repr(text) in str(caught.value)


def test_it_is_a_value_with_its_text() -> None:
    selector = Selector("a|!b")
    assert str(selector) == "a|!b"
    assert repr(selector) == "Selector(text='a|!b')"
    assert selector == Selector("a|!b")
    assert hash(selector) == hash(Selector("a|!b"))
    assert pickle.loads(pickle.dumps(selector)).matches("a")


@given(st.text(alphabet="ab.*?!|[]:ret ", max_size=12), st.text(alphabet="ab.", max_size=8))
def test_any_text_selects_or_is_refused(text: str, path: str) -> None:
    with contextlib.suppress(RewriteError):
        Selector(text).matches(path)
