"""One line of an error: the first that says something, without torch's advice and without a terminal's own codes."""

from __future__ import annotations

import io
import os

import pytest
import torch

from rewrite.errors import first_line, named_line, printable


class _Attack:
    def __reduce__(self) -> object:
        return os.system, ("touch hacked",)


def test_the_first_line_that_says_something() -> None:
    assert first_line(ValueError("\n\n  two  words \nmore")) == "two words"
    assert first_line(ValueError("")) == "ValueError"
    assert named_line(ValueError("")) == "ValueError"
    assert named_line(KeyError("x")) == "KeyError: 'x'"
    assert first_line(ValueError("a" * 400)) == "a" * 297 + "..."


def test_the_advice_to_load_unsafely_is_not_passed_on() -> None:
    buffer = io.BytesIO()
    torch.save(_Attack(), buffer)
    buffer.seek(0)
    with pytest.raises(Exception, match="weights_only") as caught:
        torch.load(buffer, weights_only=True)
    assert "weights_only" not in first_line(caught.value)
    assert "system" in first_line(caught.value)


def test_a_terminal_is_not_taken_over() -> None:
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07 \u202e\nnext") == "red \\x1b]0;title\\x07 \\u202e\nnext"
    assert "\x1b" not in first_line(ValueError("\x1b[2Jgone"))
