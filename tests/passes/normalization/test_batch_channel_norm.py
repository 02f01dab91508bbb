"""batch-channel-norm: the models the kit tries it on, the norm behind the norm, and each reason to leave one alone."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.captures import capture
from tests.models import zoo
from tests.passes.table import Row

ROWS = [
    Row("batch-channel-norm{groups=4}", "ResidualConvolutions", {"bn0_channels", "bn1_channels", "bn2_channels"}),
    Row("batch-channel-norm", "BatchNormTwice", 0, near_miss={"bn": "it is called more than once"}),
]


def test_by_hand() -> None:
    norm, x = nn.BatchNorm2d(6), torch.randn(2, 6, 3, 3)
    nn.init.normal_(norm.weight)
    result = apply(nn.Sequential(norm), "batch-channel-norm{groups=4}", args=(x,))
    inner = norm.eval()(x).reshape(2, 2, -1)
    away = inner - inner.mean(2, keepdim=True)
    expected = (away / (away.square().mean(2, keepdim=True) + norm.eps).sqrt()).reshape(x.shape)
    torch.testing.assert_close(result.module.eval()(x), expected)


def test_one_that_has_a_group_norm_behind_it_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.GroupNorm(2, 6))
    (record,) = apply(model, "batch-channel-norm", args=(torch.randn(2, 6, 3, 3),)).history
    assert [skip.reason for skip in record.skipped] == ["a GroupNorm is behind it"]


def test_a_gradient_that_is_0_but_for_rounding_breaks_no_contract() -> None:
    """The bias of a BatchNorm before a norm of single channels has none; each form rounds that in its own way."""
    case = zoo.timm_case("test_resnet", 32)
    program = capture(case.build(), *case.inputs(2, 12))
    for seed in range(2):
        assert apply(program, "batch-channel-norm{where=bn1}", seed=seed).history[-1].changed
