"""drop-attention: the models the kit tries it on, what goes with a branch, and each reason to refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, RewriteError, VerificationError, apply
from rewrite.analysis.branches import branches
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("drop-attention{layers=1}", "vit", 8, near_miss={"layers.0.attention": "layer 0 is not among"}, compiled=True),
    Row("drop-attention{layers='0,1'}", "llama", 17),
    Row("drop-attention{layers=1}", "gpt2", 7),
    Row("drop-attention{layers=2}", "t5", 9),
    Row("drop-attention{layers=0}", "convnext_atto", 0),
    Row("drop-attention{layers=0}", "resnet18", 0),
]
DIM = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Block(nn.Module):
    """Attention and an FFN; the attention's gate is also read by the FFN where ``leaks``."""

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.leaks = leaks
        self.norm1, self.norm2, self.attention = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention()
        self.ffn = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.scale, self.drop = nn.Parameter(torch.full((DIM,), 0.1)), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(self.norm1(x))
        x = x + self.drop(self.scale * a)
        y = self.ffn(self.norm2(x))
        return x + y * torch.sigmoid(a) if self.leaks else x + y


class Floored(Attention):
    """Spelled out, with scores that are at least the least number of their dtype, as XGLM has them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        least = torch.full((), torch.finfo(scores.dtype).min, device=scores.device)
        return self.out(torch.maximum(scores, least).softmax(-1) @ v)


def program_of(*blocks: nn.Module) -> Program:
    return capture(nn.Sequential(nn.Linear(4, DIM), *blocks, nn.LayerNorm(DIM)), (torch.randn(2, 5, 4),))


def test_a_number_made_of_a_dtype_is_a_part_of_the_branch() -> None:
    """It is dropped with it, and in exact arithmetic it is the least number of float64."""
    blocks = [Block(), Block()]
    for block in blocks:
        block.attention = Floored()
    program = program_of(*blocks)
    assert not [branch.leaks for branch in branches(program) if branch.leaks]
    assert apply(program, "drop-attention{layers=0 bound=9}").history[0].changed
    assert apply(program, "shallow{layers='0-1' bound=9}").history[0].changed


def test_the_whole_branch_goes_and_its_parameters_with_it() -> None:
    program = program_of(Block(), Block())
    result = apply(program, "drop-attention{layers=0}")
    gone = set(program.module.state_dict()) - set(result.module.state_dict())
    assert {name for name in gone if not name.endswith("scale")} == {
        f"1.{name}.{kind}" for name in ("norm1", "attention.qkv", "attention.out") for kind in ("weight", "bias")
    }
    assert [(b.layer, b.kind) for b in branches(result)] == [(0, "ffn"), (1, "attention"), (1, "ffn")]
    both = apply(program, "drop-attention{layers='0,1'}").module.eval()
    layer, x = program.module.eval().get_submodule, torch.randn(2, 5, 4)
    y = layer("0")(x)
    for i in (1, 2):
        y = y + layer(f"{i}.ffn.2")(F.gelu(layer(f"{i}.ffn.0")(layer(f"{i}.norm2")(y))))
    assert torch.allclose(layer("3")(y), both(x), atol=1e-6)


def test_the_error_of_each_sum_is_reported_and_held_against_the_bound(tmp_path: Path) -> None:
    program = program_of(Block(), Block())
    verification = apply(program, "drop-attention{layers=0}").history[-1].verification
    assert verification is not None
    error = verification.error("close")
    assert error is not None
    assert 0 < error < 1
    with pytest.raises(VerificationError, match="close"):
        apply(program, f"drop-attention{{layers=0 bound={error / 4}}}", crash_folder=tmp_path)


def test_a_branch_that_others_read_is_left_alone() -> None:
    result = apply(program_of(Block(leaks=True), Block()), "drop-attention{layers='0,1'}")
    skipped = {s.path: s.reason for s in result.history[-1].skipped}
    assert set(skipped) == {"1.attention", "1"}
    assert all("other things read what it computes" in reason for reason in skipped.values())
    assert [b.kind for b in branches(result)] == ["attention", "attention", "ffn"]


def test_cross_attention_stays() -> None:
    kinds = [b.kind for b in branches(apply(shared("t5"), "drop-attention{layers='0-3'}"))]
    assert kinds == ["ffn", "ffn", "cross-attention", "ffn", "cross-attention", "ffn"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drop-attention", "needs to be told which layers.*there are 0, 1"),
        ("drop-attention{layers=2}", "the model has layers 0 to 1"),
    ],
)
def test_layers_that_are_not_there_are_refused(text: str, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        apply(program_of(Block(), Block()), text)


@pytest.mark.parametrize("layers", ["x", "1,,2", "3-1", "-1"])
def test_what_is_no_list_of_numbers_is_refused(layers: str) -> None:
    with pytest.raises(RewriteError, match=r"no list of numbers|runs down"):
        apply(program_of(Block()), f"drop-attention{{layers='{layers}'}}")
