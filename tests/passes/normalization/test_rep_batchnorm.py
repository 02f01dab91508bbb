"""rep-batchnorm: the models the kit tries it on, its mixture by hand, and the schedule that it counts itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("rep-batchnorm{schedule=3}", "EncoderLayer", {"layer.norm1", "layer.norm2"}),
    Row("rep-batchnorm", "ChannelsFirstNorms", 0, near_miss={"norm": "its channels are not the last axis alone"}),
]


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4, eps=1e-5)], ids=["layer", "rms"])
def test_from_the_norm_to_a_batch_norm(norm: nn.Module) -> None:
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    model, x = nn.Sequential(norm), torch.randn(2, 3, 4)
    module = apply(model, "rep-batchnorm{schedule=4 momentum=0.5}", args=(x,)).module
    torch.testing.assert_close(module.eval()(x), model(x))
    layer = module.get_submodule("0").train()
    batch = nn.BatchNorm1d(4, momentum=0.5)
    with torch.no_grad():
        batch.weight.copy_(norm.weight)  # type: ignore[arg-type]
    layer.get_parameter("alpha").data.fill_(0.3)
    for share in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0):
        x = torch.randn(2, 3, 4)
        rep = batch(x.flatten(0, 1)).reshape(x.shape) + 0.3 * x
        torch.testing.assert_close(layer(x), share * norm(x) + (1 - share) * rep)
    torch.testing.assert_close(layer.eval()(x), batch.eval()(x.flatten(0, 1)).reshape(x.shape) + 0.3 * x)
