"""Checks of a pass as text: what it tells about itself, and its options there and back."""

from __future__ import annotations

import json

from rewrite.errors import RewriteError
from rewrite.pipeline.pass_ import describe
from rewrite.pipeline.registry import refusal
from rewrite.pipeline.text import parse

from .trial import Trial, fail


def check_described(trial: Trial) -> str:
    """The registry takes the class; it has a docstring, and every option a line of help."""
    kind = type(trial.step)
    reason = refusal(getattr(kind, "name", ""), kind)
    if reason:
        raise fail("described", reason)
    told = describe(kind)
    if not told.summary:
        raise fail("described", f"{kind.__name__} has no docstring: its first line is what users are told")
    dumb = [option.name for option in told.options if not option.help]
    if dumb:
        raise fail("described", f"option {dumb[0]} has no line of help: give it option(default, help)")
    return f"{told.summary} {len(told.options)} options"


def check_text(trial: Trial) -> str:
    """Pass to text to pass is a round trip, with these options and with the defaults; the options are JSON values."""
    kind = type(trial.step)
    for step in (trial.step, kind()):
        try:
            (element,) = parse(step.text)
            again = kind.from_options(dict(element.options))
        except (RewriteError, ValueError) as error:
            raise fail("text", f"{step.text!r} cannot be read back: {error}") from error
        if element.name != kind.name or again != step or again.text != step.text:
            raise fail("text", f"{step!r} is written {step.text!r}, which is read as {again!r}")
        json.dumps(step.options(), allow_nan=False)
    return trial.step.text
