"""dual-patchnorm: the models the kit tries it on, both norms by hand, and what is left alone."""

from __future__ import annotations

import torch
from torch import nn

from rewrite import apply
from tests.passes.table import Row

ROWS = [
    Row("dual-patchnorm", "vit", {"embeddings.patch_embeddings.projection"}),
    Row(
        "dual-patchnorm",
        "ResidualConvolutions",
        0,
        near_miss={"stem": "its patches overlap, are padded or fall into groups"},
    ),
]


def test_by_hand() -> None:
    conv, x = nn.Conv2d(2, 6, (2, 3), stride=(2, 3)), torch.randn(2, 2, 5, 6)
    layer = apply(nn.Sequential(conv), "dual-patchnorm{eps=0.1}", args=(x,)).module.get_submodule("0")
    for name in ("patch_weight", "patch_bias", "channel_weight", "channel_bias"):
        nn.init.normal_(layer.get_parameter(name))
    patch = x[1, :, 2:4, 3:6].flatten()
    first, last = ([layer.get_parameter(f"{at}_{name}") for name in ("weight", "bias")] for at in ("patch", "channel"))
    inner = nn.functional.layer_norm(patch, (12,), *first, eps=0.1)
    outer = conv.weight.flatten(1) @ inner + conv.bias
    expected = nn.functional.layer_norm(outer, (6,), *last, eps=0.1)
    assert layer(x).shape == (2, 6, 2, 2)
    torch.testing.assert_close(layer(x)[1, :, 1, 1], expected)


def test_a_convolution_that_reads_no_image_is_no_patch_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2))
    (record,) = apply(model, "dual-patchnorm", args=(torch.randn(1, 3, 8, 8),)).history
    assert [site.path for site in record.changes] == ["0"]
    again = apply(model, "dual-patchnorm,dual-patchnorm", args=(torch.randn(1, 3, 8, 8),)).history[-1]
    assert [skip.reason for skip in again.skipped] == ["it is a NormedPatches, no plain convolution"]
