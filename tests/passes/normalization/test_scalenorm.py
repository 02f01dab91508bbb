"""scalenorm: the models the kit tries it on, its formula by hand, and where it is the norm itself."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("scalenorm", "EncoderLayer", {"layer.norm1", "layer.norm2"}),
    Row("scalenorm", "ChannelsFirstNorms", {"norm"}),
    Row("scalenorm", "ResidualConvolutions", 0),
]
DIM = 8


def test_by_hand() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(DIM, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layer = apply(nn.Sequential(nn.Linear(DIM, DIM), norm), "scalenorm", args=(torch.randn(2, DIM),)).module.get_submodule(
        "1"
    )
    layer.get_parameter("scale").data.fill_(3.0)
    x = torch.randn(5, DIM)
    length = (x.square().sum(-1, keepdim=True) + DIM * 1e-3).sqrt()
    torch.testing.assert_close(layer(x), norm.weight * 3 * x / length + norm.bias)


def test_at_the_start_it_is_the_function_of_an_rmsnorm() -> None:
    norm = nn.RMSNorm(DIM, eps=1e-5)
    nn.init.normal_(norm.weight)
    model, x = nn.Sequential(nn.Linear(4, DIM), norm, nn.Linear(DIM, 3)), torch.randn(6, 4)
    result = apply(model, "scalenorm", args=(x,))
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-5, atol=1e-6)
    alone = apply(model, "fold-affine,scalenorm", args=(x,))
    assert [name for name, _ in alone.module.get_submodule("1").named_parameters()] == ["scale"]
    torch.testing.assert_close(alone.module(x), model(x), rtol=1e-5, atol=1e-6)
