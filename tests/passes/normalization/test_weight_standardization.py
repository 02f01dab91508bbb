"""weight-standardization: the models the kit tries it on, the weight by hand, and each reason to leave a layer alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite import RewriteError, apply
from tests.captures import shared
from tests.passes.table import Row

ROWS = [
    Row("weight-standardization", "ResidualConvolutions", {"stem", "conv1", "conv2"}),
    Row("weight-standardization", "EncoderLayer", 0),
]


def test_by_hand() -> None:
    conv, x = nn.Conv2d(3, 4, 3, padding=1, groups=1), torch.randn(2, 3, 5, 5)
    result = apply(nn.Sequential(conv), "weight-standardization{eps=0.01}", args=(x,))
    rows = conv.weight.flatten(1)
    standard = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 0.01).sqrt()
    expected = F.conv2d(x, standard.reshape(conv.weight.shape), conv.bias, padding=1)
    torch.testing.assert_close(result.module(x), expected)
    assert torch.equal(result.module.get_parameter("0.weight"), conv.weight)


def test_what_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 2, 1))
    record = apply(model, "random-prune{where=1},weight-standardization", args=(torch.randn(2, 4, 3, 3),)).history[-1]
    assert not record.changed
    assert {skip.path: skip.reason for skip in record.skipped} == {
        "0": "each output channel reads a single number, which has no variance",
        "1": "it is a MaskedConv2d, no plain convolution",
    }


def test_what_a_standardized_weight_reads_keeps_its_size() -> None:
    program = apply(shared("ResidualConvolutions"), "weight-standardization")
    for text in ("expand{hidden=+5}", "expand{method=net2net channels=+2}"):
        with pytest.raises(RewriteError, match="conv1: the weight is standardized over all that it reads"):
            apply(program, text)
