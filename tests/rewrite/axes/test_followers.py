"""Tensors that training alone reads grow with their channels, are not copied, or hold the layer's sizes."""

from __future__ import annotations

import pytest
import torch

import rewrite
from rewrite.axes import followers
from tests.captures import shared

STATE = {"power-norm": {"control": (13,)}, "unified-norm": {"squares": (4, 13), "controls": (4, 13)}}


@pytest.mark.parametrize("step", STATE)
def test_they_grow_with_their_channels_and_the_next_gradients_stay(step: str) -> None:
    """Behind a step of training, when means of gradients are there."""
    program = rewrite.apply(shared("PreNormDecoder"), step)
    program.module.train()(*program.example_args, **program.example_kwargs).sum().backward()
    program.module.zero_grad()
    grown = rewrite.apply(program, "expand{hidden=+5}")
    layer = grown.module.get_submodule("layers.0.norm")
    for name, shape in STATE[step].items():
        old = program.module.get_buffer(f"layers.0.norm.{name}")
        assert old.any()
        assert layer.get_buffer(name).shape == shape
        assert torch.equal(layer.get_buffer(name)[..., :8], old)


@pytest.mark.parametrize("text", ["expand{method=clone hidden=2x untie=true}", "expand{method=lemon hidden=+4}"])
def test_means_of_gradients_are_not_copied(text: str) -> None:
    program = rewrite.apply(shared("PreNormDecoder"), "power-norm")
    with pytest.raises(rewrite.RewriteError, match="its entries meet in means of gradients: copies would be felt"):
        rewrite.apply(program, text)


def test_where_nothing_is_said_of_one_the_layer_keeps_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    program = rewrite.apply(shared("PreNormDecoder"), "unified-norm")
    monkeypatch.setattr(followers, "FOLLOWERS", [])
    with pytest.raises(rewrite.RewriteError, match="'squares' of UnifiedNorm is for in training is not known"):
        rewrite.apply(program, "expand{hidden=+5}")
