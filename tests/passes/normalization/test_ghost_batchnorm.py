"""ghost-batchnorm: the models the kit tries it on, statistics of parts by hand, and what is left alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("ghost-batchnorm{size=1}", "ResidualConvolutions", {"bn0", "bn1", "bn2"}),
    Row("ghost-batchnorm", "EncoderLayer", 0),
]


def parted(model: nn.BatchNorm1d, x: Tensor, size: int) -> nn.Module:
    return apply(nn.Sequential(model), f"ghost-batchnorm{{size={size}}}", args=(x,)).module.get_submodule("0")


def test_each_part_has_statistics_of_its_own_and_they_are_taken_in_one_by_one() -> None:
    x = torch.randn(7, 3)
    norm = nn.BatchNorm1d(3, momentum=0.25)
    nn.init.normal_(norm.weight)
    layer = parted(norm, x, 3).train()
    mean = torch.zeros(3)
    for part, found in zip((x[:4], x[4:]), layer(x).split([4, 3]), strict=True):
        expected = (part - part.mean(0)) / (part.var(0, correction=0) + norm.eps).sqrt() * norm.weight
        torch.testing.assert_close(found, expected)
        mean = 0.75 * mean + 0.25 * part.mean(0)
    torch.testing.assert_close(layer.get_buffer("running_mean"), mean)
    assert int(layer.get_buffer("num_batches_tracked")) == 2


def test_evaluation_stays_as_it_is() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    assert torch.equal(parted(norm, x, 2).eval()(x), norm.eval()(x))


def test_a_cumulative_average_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None)).eval()
    (record,) = apply(model, "ghost-batchnorm", args=(torch.randn(4, 3),)).history
    assert not record.changed
    assert [skip.reason for skip in record.skipped] == ["its running statistics are a cumulative average"]
