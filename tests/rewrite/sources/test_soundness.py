"""A module from a damaged file is refused by what is wrong with it, before anything walks over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.sources.soundness import check_sound


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda m: m._modules.update({(1, 2): nn.ReLU()}), "a Sequential in it has no sound _modules"),
        (lambda m: m[1].__dict__.pop("_modules"), "a Sequential in it has no sound _modules"),
        (lambda m: m[0].__dict__.update(_parameters=[1]), "a Linear in it has no sound _parameters"),
        (lambda m: m[0]._buffers.update(x="text"), "a Linear in it has no sound _buffers"),
        (lambda m: m[0].__dict__.pop("in_features"), "has lost a part .*in_features"),
    ],
    ids=["names", "table", "kind", "value", "part"],
)
def test_damage_is_named(harm: Callable[[nn.Sequential], object], expected: str) -> None:
    damaged = model()
    harm(damaged)
    with pytest.raises(RewriteError, match=f"m.pt is damaged: .*{expected}"):
        check_sound(Path("m.pt"), damaged)


def test_whole_modules_are_sound() -> None:
    whole = model()
    whole.again = whole[0]
    whole[0].register_buffer("nothing", None)
    whole[1].register_parameter("free", nn.Parameter(torch.zeros(2)))
    check_sound(Path("m.pt"), whole)
