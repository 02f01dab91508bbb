"""layernorm: the models the kit tries it on, the way back from rmsnorm, and each reason to leave a norm alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import apply
from tests.captures import shared
from tests.passes.normalization.test_rmsnorm import DIM, Block, Language, Odd, Vision, layer_norms, moved, skipped
from tests.passes.table import Row

ROWS = [
    Row("layernorm", "gpt2", 11, after="rmsnorm{centering=keep}"),
    Row("layernorm{mode=swap}", "llama", 5),
    Row("layernorm{mode=swap}", "EncoderLayer", 2, after="dyt"),
    Row("layernorm", "EncoderLayer", 0),
]


@pytest.mark.parametrize("name", ["Vision", "Language", "Odd"])
def test_it_undoes_rmsnorm_where_centering_was_kept(name: str) -> None:
    models = {
        "Vision": lambda: Vision(scaled=True),
        "Language": lambda: Language(normed=True, p=0.25),
        "Odd": lambda: Odd("offset"),
    }
    model = moved(models[name]())
    x = {"Vision": torch.randn(2, 3, 4, 4), "Language": torch.randint(11, (2, 6)), "Odd": torch.randn(2, 5, 4)}[name]
    away, back = (apply(model, text, args=(x,)) for text in ("rmsnorm{centering=keep}", "rmsnorm{centering=keep},layernorm"))
    assert layer_norms(away) == []
    assert sorted(layer_norms(back)) == sorted(layer_norms(apply(model, [], args=(x,))))
    assert {type(layer).__module__.split(".")[0] for _, layer in back.layers()} <= {"torch", "rewrite"}
    assert not [layer for _, layer in back.layers() if "Center" in type(layer).__name__]
    ours, theirs = back.module.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    torch.testing.assert_close(back.module.eval()(x), model.eval()(x))


def test_some_norms_of_a_stream() -> None:
    model, x = moved(Vision()), torch.randn(2, 3, 4, 4)
    result = apply(model, "rmsnorm{centering=keep},layernorm{where=blocks.0.norm}", args=(x,))
    assert layer_norms(result) == ["blocks.0.norm"]
    assert [layer for _, layer in result.layers() if "Center" in type(layer).__name__]
    torch.testing.assert_close(result.module(x), model(x))


def test_the_plain_replacement_by_hand() -> None:
    norm, x = nn.RMSNorm(DIM, eps=0.1), torch.randn(3, DIM)
    nn.init.normal_(norm.weight)
    result = apply(nn.Sequential(norm), "layernorm{mode=swap}", args=(x,))
    torch.testing.assert_close(result.module(x), nn.functional.layer_norm(x, (DIM,), norm.weight, None, 0.1))
    back = apply(nn.Sequential(nn.LayerNorm(DIM, eps=0.1)), "dyt,layernorm{mode=swap}", args=(x,))
    torch.testing.assert_close(back.module(x), nn.functional.layer_norm(x, (DIM,), eps=0.1))


def test_what_is_left_alone() -> None:
    x = torch.randn(2, 5, 4)
    model = nn.Sequential(nn.Linear(4, DIM), Block(), nn.LayerNorm(DIM))
    baked = skipped(apply(model, "rmsnorm,layernorm", args=(x,)).history[-1])
    assert baked["2"] == "0 writes to the stream with a mean; mode=swap replaces it all the same"
    other = skipped(apply(model, "dyt,layernorm", args=(x,)).history[-1])
    assert other["2"].startswith("a DynamicTanh is another function")
    offset = nn.Sequential(nn.Linear(4, DIM), nn.RMSNorm(DIM))
    assert "no eps of its own" in skipped(apply(offset, "layernorm", args=(x,)).history[-1])["1"]


def test_channels_along_another_axis() -> None:
    result = apply(shared("ChannelsFirstNorms"), "rmsnorm{mode=swap},layernorm{mode=swap}")
    assert skipped(result.history[-1]) == {"norm": "its channels are not the last axis"}
