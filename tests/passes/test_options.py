"""Every value of every option that has names for its values, or is a switch, is proven on some model."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import rewrite
from rewrite.pipeline.registry import as_passes
from tests.passes.normalization.test_dyt import sequences

from .table import passes, rows, subject

TRIED = {
    "compress-activations{bits=2}": "gpt2",
    "compress-activations{format=fp8 group=16}": "bert",
    "deepnorm{mode=new}": "bert",
    "derf{calibrate=formula}": "EncoderLayer",
    "eln{calibrate=formula}": "EncoderLayer",
    "expand{layers=+1 at=end}": "gpt2",
    "expand{layers=+1 at=copy}": "vit",
    "expand{ffn=2x init=zero}": "llama",
    "expand{ffn=2x init=orthogonal}": "vit",
    "expand{ffn=2x init=hadamard}": "bert",
    "expand{ffn=2x init=copy}": "gpt2",
    "few-bit{bits=1}": "vit",
    "few-bit{bits=3}": "gpt2",
    "few-bit{bits=4}": "vit",
    "few-bit{bits=5}": "gpt2",
    "few-bit{bits=6}": "vit",
    "few-bit{density=data}": "gpt2",
    "fit-memory{budget=0.5 lossy=false}": "vit",
    "layer-merge{latency=measured speedup=1.01 bound=9}": "TwoConvolutions",
    "layer-merge{drop=false speedup=1.01 latency=flops bound=9}": "TwoConvolutions",
    "merge-convs{hoist=true}": "TwoConvolutions",
    "merge-linears{within=model}": "bert",
    "norm-scaling{mode=new}": "vit",
    "normformer{heads=false}": "gpt2",
    "normformer{attention=false}": "vit",
    "normformer{ffn=false}": "gpt2",
    "random-prune{sparsity=0.5 ratios=er}": "bert",
    "randomized-linear{sketch=rademacher ratio=0.5}": "gpt2",
    "randomized-linear{sketch=dct ratio=0.5}": "gpt2",
}
ELSEWHERE = {("expand", "method", "clone"), ("expand", "untie", "True"), ("rmsnorm", "compressed", "True")}
"""Held against the kit in the passes' own tests, on models made for them."""


@pytest.mark.parametrize("step", TRIED)
def test_it_is_proven_on_a_model(step: str, tmp_path: Path) -> None:
    data = sequences() if "calibrate=formula" in step else None
    program = rewrite.apply(subject(TRIED[step]).program, step, data=data, crash_folder=tmp_path)
    record = program.history[-1]
    assert record.changed
    assert record.verification is not None
    assert record.verification.passed


def values(name: str) -> Iterator[tuple[str, str, str]]:
    """Every value of a pass's options that can be listed: pass, option, value."""
    kind = rewrite.get_pass(name)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        named = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (False, True) if hint is bool else ()
        yield from ((name, field.name, str(value)) for value in named)


def test_no_value_of_an_option_is_left_out() -> None:
    steps = [step for text in (*(row.step for _, row in rows()), *TRIED) for step in as_passes(text)]
    seen = {(step.name, field.name, str(getattr(step, field.name))) for step in steps for field in dataclasses.fields(step)}
    assert {each for name in passes() for each in values(name)} - seen - ELSEWHERE == set()
