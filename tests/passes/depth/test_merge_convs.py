"""merge-convs: the models the kit tries it on, kernels, strides, dilations, groups, hoisted padding, what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, apply
from tests.passes.table import Row

ROWS = [
    Row("merge-convs", "TwoConvolutions", 5, near_miss={"second": "hoist=true moves the padding"}),
    Row("merge-convs", "resnet18", 0),
]
X = torch.randn(2, 4, 17, 17, generator=torch.Generator().manual_seed(0))


def pair(first: dict[str, Any], second: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, **first), nn.Conv2d(6, 8, **second)).double()


def merged(model: nn.Module, text: str = "merge-convs", x: Tensor = X) -> Program:
    return apply(model, text, args=(x.double(),))


PAIRS = [
    ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3}),
    ({"kernel_size": 1, "bias": False}, {"kernel_size": 3, "padding": 1}),
    ({"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}, {"kernel_size": 3, "stride": (1, 2), "bias": False}),
    ({"kernel_size": 2, "dilation": 3}, {"kernel_size": 3, "dilation": 2, "stride": 2}),
    ({"kernel_size": 3, "groups": 2}, {"kernel_size": 3, "groups": 2}),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_one_convolution_is_the_two(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = pair(first, second)
    program = merged(model)
    ((_, layer),) = program.layers()
    assert type(layer) is nn.Conv2d
    assert torch.allclose(program.module(X.double()), model(X.double()), rtol=1e-12, atol=1e-12)
    assert program.history[0].verification is not None
    assert program.history[0].contract == "forward same, backward same"


def test_padding_is_hoisted_where_it_is_asked_for_and_only_the_border_changes() -> None:
    model = pair({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1})
    (record,) = merged(model).history
    assert [s.reason for s in record.skipped] == [
        "it pads what the first gives, which is no zero there; hoist=true moves the padding"
    ]
    program = merged(model, "merge-convs{hoist=true}")
    first, second = model
    y = F.conv2d(F.pad(X.double(), (2, 2, 2, 2)), first.weight, first.bias)
    found = program.module(X.double())
    assert torch.allclose(found, F.conv2d(y, second.weight, second.bias), atol=1e-12)
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(found[inside], model(X.double())[inside], atol=1e-12)
    assert [s.name for s in program.history[0].steps] == ["hoist-padding", "merge-pairs"]


def test_one_dimension_and_three_in_a_row() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv1d(3, 4, 2, bias=False), nn.Conv1d(4, 5, 4)).double()
    x = torch.randn(2, 2, 20)
    program = merged(model, "merge-convs,merge-convs", x)
    ((_, layer),) = program.layers()
    assert layer.kernel_size == (7,)
    assert torch.allclose(program.module(x.double()), model(x.double()), atol=1e-12)


def _read(model: nn.Sequential) -> nn.Module:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x)
            return y.abs(), self.b(y)

    return Read()


def test_reasons_to_leave_a_pair_alone() -> None:
    plain = {"kernel_size": 3}
    reasons = {
        "a is read elsewhere too": _read(pair(plain, plain)),
        "the two have other groups": pair({**plain, "groups": 2}, plain),
        "one of the two pads by other than a number of zeros": pair(plain, {**plain, "padding": "same"}),
    }
    for reason, model in reasons.items():
        assert [s.reason for s in merged(model).history[0].skipped] == [reason]
