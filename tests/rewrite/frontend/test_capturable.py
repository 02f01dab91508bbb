"""Compiled, scripted and quantised models are told the way out, from Python and from the command line alike."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.errors import RewriteError


class _Packed(nn.Parameter):
    """As libraries of quantised weights have them: a parameter that says it is made of others."""

    def __tensor_flatten__(self) -> Any:
        return ["data"], None


def _quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})


def _packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = _Packed(torch.zeros(8, 8))
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: torch.compile(nn.Linear(8, 8)), "is a compiled model .*_orig_mod"),
        (lambda: torch.jit.script(nn.Linear(8, 8)), "made by torch.jit: give the module"),
        (_quantised, "0 is quantised .*before it is quantised"),
        (_packed, "0.weight is quantised .*before it is quantised"),
    ],
    ids=["compiled", "scripted", "quantised", "packed"],
)
def test_the_way_out(model: Any, expected: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model()
    with pytest.raises(RewriteError, match=expected):
        rewrite.capture(made, (torch.zeros(2, 8),))
