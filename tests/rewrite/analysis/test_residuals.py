"""Residual structure: which additions are residual, which norms are post-norms, and what a warning names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, apply
from rewrite.analysis.branches import branches
from rewrite.analysis.norms import norms
from rewrite.analysis.residuals import post_norms, residual_adds
from tests.captures import capture, shared

DIM = 8


class Block(nn.Module):
    """Two branches around one stream, put together as ``forms`` says."""

    def __init__(self, form: str, drop: float = 0.0) -> None:
        super().__init__()
        self.form = form
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention, self.mlp = nn.Linear(DIM, DIM), nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.form](self, x)


def pre(b: Block, x: Tensor) -> Tensor:
    x = x + b.drop(b.attention(b.norm1(x)))
    return x + b.drop(b.mlp(b.norm2(x)))


def post(b: Block, x: Tensor) -> Tensor:
    x = b.norm1(x + b.drop(b.attention(x)))
    return b.norm2(x + b.drop(b.mlp(x)))


def res_post(b: Block, x: Tensor) -> Tensor:
    x = x + b.drop(b.norm1(b.attention(x)))
    return x + b.drop(b.norm2(b.mlp(x)))


def parallel(b: Block, x: Tensor) -> Tensor:
    return x + b.attention(b.norm1(x)) + b.mlp(b.norm2(x))


def parallel_one_norm(b: Block, x: Tensor) -> Tensor:
    y = b.norm1(x)
    return x + (b.attention(y) + b.mlp(b.norm2(y)))


def scaled(b: Block, x: Tensor) -> Tensor:
    x = x + 0.5 * b.attention(b.norm1(x))
    return x + 0.5 * b.mlp(b.norm2(x))


def in_place(b: Block, x: Tensor) -> Tensor:
    x = b.attention(x)
    x += b.drop(b.attention(b.norm1(x)))
    x += b.mlp(b.norm2(x))
    return x


FORMS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "pre": pre,
    "post": post,
    "res_post": res_post,
    "parallel": parallel,
    "parallel_one_norm": parallel_one_norm,
    "scaled": scaled,
    "in_place": in_place,
}


def model_of(form: str, depth: int = 2, drop: float = 0.0) -> Program:
    blocks = [Block(form, drop) for _ in range(depth)]
    return capture(
        nn.Sequential(nn.Linear(DIM, DIM), *blocks, nn.LayerNorm(DIM), nn.Linear(DIM, 3)), (torch.randn(2, 5, DIM),)
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_residual_adds_are_found(form: str, drop: float) -> None:
    found = residual_adds(model_of(form, drop=drop))
    assert len(found) == (2 if form == "parallel_one_norm" else 4)
    assert all(r.skip is not r.branch for r in found)


def test_skip_and_branch() -> None:
    program = model_of("pre", depth=1)
    first, second = residual_adds(program)
    assert str(first.skip.target) == "0"
    assert str(first.branch.target) == "1.attention"
    assert second.skip is first.node
    assert str(second.branch.target) == "1.mlp.2"


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("form", [f for f in FORMS if f != "post"])
def test_norms_of_a_branch_are_no_post_norms(form: str, drop: float) -> None:
    program = model_of(form, drop=drop)
    assert post_norms(program, norms(program)) == []


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_post_norms_are_the_blocks_norms(depth: int, drop: float) -> None:
    """The model's last norm follows a norm, not a sum: it is none."""
    program = model_of("post", depth, drop)
    found = [n.path for n in post_norms(program, norms(program))]
    assert sorted(found) == sorted(f"{i + 1}.norm{j}" for i in range(depth) for j in (1, 2))


def test_post_norm_model_that_ends_in_its_last_block() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), Block("post"), Block("post"))
    program = capture(model, (torch.randn(2, 5, DIM),))
    assert {n.path for n in post_norms(program, norms(program))} == {"1.norm1", "1.norm2", "2.norm1", "2.norm2"}


def test_addition_of_two_inputs_is_not_residual() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x) + self.b(x))

    program = capture(Sum(), (torch.randn(2, 5, DIM),))
    assert residual_adds(program) == []
    assert post_norms(program, norms(program)) == []


class Attention(nn.Module):
    """Scores, to which a bias of all layers is added as ``form`` says, in place or not."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        if self.form == "in place":
            scores += bias
            return self.o(torch.softmax(scores.double(), -1).type_as(scores) @ self.v(x))
        return self.o(torch.softmax(bias + scores, -1) @ self.v(x))


@pytest.mark.parametrize("form", ["in place", "beside"])
def test_a_bias_of_all_layers_that_holds_a_mask_is_no_stream(form: str) -> None:
    """With the mask of each sample the bias has the scores' sizes, and the second layer's are computed from it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(1, 5, 5))
            self.layers = nn.ModuleList(Attention(form) for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            bias = self.bias + mask
            for layer in self.layers:
                x = x + layer(x, bias)
            return x

    program = capture(Model(), (torch.randn(2, 5, DIM), torch.randn(2, 1, 5)))
    assert [str(r.branch.target) for r in residual_adds(program)] == ["layers.0.o", "layers.1.o", "layers.2.o"]
    assert [b.path for b in branches(program)] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit", 4),
        ("vit_tiny_patch16_224", 8),
        ("gpt2", 4),
        ("llama", 4),
        ("bert", 4),
        ("resnet18", 2),
        ("convnext_atto", 5),
        ("t5", 10),
    ],
)
def test_residual_adds_of_the_development_models(name: str, count: int) -> None:
    assert len(residual_adds(shared(name))) == count


@pytest.mark.parametrize("name", ["vit", "vit_tiny_patch16_224", "gpt2", "llama", "t5", "convnext_atto"])
def test_prenorm_models_have_no_post_norms(name: str) -> None:
    assert post_norms(shared(name), norms(shared(name))) == []


BERT_POSTS = {f"encoder.layer.{i}.{part}.LayerNorm" for i in (0, 1) for part in ("attention.output", "output")}


@pytest.mark.xdist_group("bert")
def test_post_norms_of_bert() -> None:
    assert {n.path for n in post_norms(shared("bert"), norms(shared("bert")))} == BERT_POSTS


def warnings(program: Program, text: str) -> list[str]:
    return list(apply(program, text, verify=False, share=True).history[0].warnings)


def named(warning: str) -> set[str]:
    return set(warning.rpartition(": ")[2].split(", "))


def test_dyt_warns_of_exactly_the_post_norms() -> None:
    (warning,) = warnings(shared("bert"), "dyt")
    assert named(warning) == BERT_POSTS
    assert "known not to train in place of post-norms" in warning
    assert warnings(shared("vit"), "dyt") == []


@pytest.mark.xdist_group("bert")
def test_dyt_warns_of_the_selected_ones_alone() -> None:
    assert warnings(shared("bert"), "dyt{where=embeddings*}") == []
    (warning,) = warnings(shared("bert"), "dyt{where='encoder.layer.0.*'}")
    assert named(warning) == {p for p in BERT_POSTS if ".0." in p}
    (only_second,) = warnings(shared("bert"), "dyt{where=encoder.layer.1.output.LayerNorm}")
    assert named(only_second) == {"encoder.layer.1.output.LayerNorm"}
