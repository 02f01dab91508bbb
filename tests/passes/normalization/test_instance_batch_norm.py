"""instance-batch-norm: the models the kit tries it on, both halves by hand, and each reason to leave a norm alone."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("instance-batch-norm", "ResidualConvolutions", {"bn0", "bn1", "bn2"}),
    Row("instance-batch-norm", "EncoderLayer", 0),
]


def test_by_hand() -> None:
    norm, x = nn.BatchNorm2d(5, momentum=0.5), torch.randn(3, 5, 4, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = apply(nn.Sequential(norm), "instance-batch-norm{share=0.4}", args=(x,)).module.get_submodule("0").train()
    first, rest = nn.functional.instance_norm(x[:, :2], eps=norm.eps), nn.BatchNorm2d(3, momentum=0.5)(x[:, 2:])
    expected = torch.cat([first, rest], 1) * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)
    running = layer.get_buffer("running_mean")
    torch.testing.assert_close(running, torch.cat([torch.zeros(2), 0.5 * x[:, 2:].mean((0, 2, 3))]))
    rest_eval = nn.functional.batch_norm(x, running, layer.get_buffer("running_var"), norm.weight, norm.bias)[:, 2:]
    torch.testing.assert_close(layer.eval()(x)[:, 2:], rest_eval)
    torch.testing.assert_close(layer(x)[:, :2], expected[:, :2])


def test_what_is_left_alone() -> None:
    norms = [nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.BatchNorm1d(36)]
    (record,) = apply(nn.Sequential(*norms).eval(), "instance-batch-norm", args=(torch.randn(2, 4, 3, 3),)).history
    assert {skip.path: skip.reason for skip in record.skipped} == {
        "0": "it has no running statistics with a momentum",
        "2": "its input has no positions to take statistics of",
    }
