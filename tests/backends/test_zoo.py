"""The development models through every lowering that compiles nothing, as they are and converted."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import rewrite
from rewrite.graph.program import Program
from rewrite.numerics.compare import relative_error
from tests.captures import shared
from tests.models.zoo import Case, development_cases

CASES = {case.name: case for case in development_cases()}
SIZES = ((2, 8), (3, 11), (1, 7))

#: Largest relative error by lowering. ONNX Runtime measured 1e-7 to 1.4e-6 in float32; eager is the same code.
TOLERANCES = {"eager": 0.0, "onnxruntime": 1e-5}

#: Model, passes, lowering. To ONNX Runtime deit_tiny is the same graph as vit_tiny.
ROWS = [
    *((name, "", "eager") for name in CASES),
    *((name, "", "onnxruntime") for name in CASES if name != "deit_tiny_patch16_224"),
    *((name, "dyt", "onnxruntime") for name in ("convnext_atto", "gpt2", "llama", "vit")),
]


@functools.cache
def program(name: str, passes: str) -> Program:
    if passes:
        return rewrite.apply(program(name, ""), passes, verify=False)
    return shared(name)


def model_outputs(case: Case, args: Any, kwargs: Any) -> Any:
    """What the user's own model gives in evaluation; without a cache, which no capture has."""
    model = case.build().eval()
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs = {**kwargs, "use_cache": False}
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.parametrize(("name", "passes", "lowering"), ROWS)
def test_outputs_are_the_same(name: str, passes: str, lowering: str) -> None:
    run = rewrite.lower(program(name, passes), lowering)
    reference = rewrite.lower(program(name, passes))
    for size in SIZES:
        args, kwargs = CASES[name].inputs(*size)
        expected = reference(*args, **kwargs) if passes else model_outputs(CASES[name], args, kwargs)
        found = run(*args, **kwargs)
        assert type(found) is type(expected)
        for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
            assert relative_error(a, b) <= TOLERANCES[lowering]
