"""fold-affine: the models the kit tries it on, the folded weights by hand, and each reason to leave a norm alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rewrite import apply
from tests.passes.table import Row

DIM = 8

ROWS = [
    Row("fold-affine", "vit", 20, near_miss={"layernorm": "the model's output reads it, which is no linear"}),
    Row("fold-affine", "llama", 14, near_miss={"norm": "the model's output reads it, which is no linear"}),
    Row("fold-affine", "t5", 28),
    Row("fold-affine", "EncoderLayer", 6),
    Row("fold-affine", "bert", 0),
    Row("fold-affine", "convnext_atto", 27, near_miss={"stem.1": "stages.0.blocks.0.conv_dw reads it, which is no"}),
    Row("fold-affine", "gpt2", 12, near_miss={"ln_f": "the model's output reads it, which is no linear"}),
    Row("fold-affine", "resnet18", 0),
]


class Model(nn.Module):
    """A norm whose output goes into two linear layers; more readers as ``extra`` says."""

    def __init__(self, norm: nn.Module, extra: str = "", *, bias: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.second = nn.Linear(DIM, 4, bias=bias), nn.Linear(DIM, 4, bias=bias)
        self.extra = extra
        if extra == "shared":
            self.third = nn.Linear(DIM, 4)
            self.third.weight = self.first.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        y = self.first(n) + self.second(n)
        if self.extra == "residual":
            return y + n[..., :4]
        if self.extra == "elsewhere":
            return y + self.first(x)
        if self.extra == "twice":
            return y + self.second(self.norm(x + 1))
        return y + self.third(x) if self.extra == "shared" else y


def test_by_hand() -> None:
    torch.manual_seed(0)
    model = Model(nn.LayerNorm(DIM))
    result = apply(model, "fold-affine", args=(torch.randn(3, DIM),)).module
    old, new = model.first, result.get_submodule("first")
    assert torch.allclose(new.weight, old.weight * model.norm.weight)
    assert torch.allclose(new.bias, old.bias + old.weight @ model.norm.bias, atol=1e-6)
    assert sorted(result.state_dict()) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    x = torch.randn(5, DIM)
    assert torch.allclose(model(x), result(x), atol=1e-5)


REASONS = {
    "residual": (nn.LayerNorm(DIM), "residual", True, "reads it, which is no linear layer or convolution"),
    "elsewhere": (nn.LayerNorm(DIM), "elsewhere", True, "first, which reads it, is called elsewhere too"),
    "twice": (nn.LayerNorm(DIM), "twice", True, "it is called more than once"),
    "shared": (nn.LayerNorm(DIM), "shared", True, "first, which reads it, shares its weight with third.weight"),
    "no bias": (nn.LayerNorm(DIM), "", False, "first, which reads it, has no bias to take its own"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_to_leave_a_norm_alone(name: str) -> None:
    norm, extra, bias, reason = REASONS[name]
    model = Model(copy.deepcopy(norm), extra, bias=bias)
    (record,) = apply(model, "fold-affine", args=(torch.randn(3, DIM),)).history
    assert not record.changed
    assert all(skipped.reason.endswith(reason) for skipped in record.skipped)
    assert record.skipped


@pytest.mark.parametrize("norm", [nn.LayerNorm(DIM, bias=False), nn.RMSNorm(DIM, eps=1e-5)], ids=["layer", "rms"])
def test_a_weight_alone_needs_no_bias(norm: nn.Module) -> None:
    model = Model(copy.deepcopy(norm), bias=False)
    (record,) = apply(model, "fold-affine", args=(torch.randn(3, DIM),)).history
    assert record.changed


class Pooled(nn.Module):
    """A norm read by a linear layer through what chooses tokens, or averages over them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.head = how, nn.LayerNorm(DIM), nn.Linear(DIM, 4)
        self.drop = nn.Dropout(0.0 if how != "dropped" else 0.1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        chosen = {"first": n[:, 0], "some": n[:, 1:], "mean": n.mean(1), "sum": n.sum(1)}
        if self.how == "axes":
            return self.head(n.mean((1, 2))[:, None].expand(-1, DIM))
        return self.head(self.drop(chosen.get(self.how, n)))


@pytest.mark.parametrize("how", ["first", "some", "mean", "dropless"])
def test_what_chooses_or_averages_tokens_is_looked_through(how: str) -> None:
    torch.manual_seed(0)
    model, x = Pooled(how), torch.randn(2, 5, DIM)
    with torch.no_grad():
        model.norm.weight.copy_(torch.randn(DIM)), model.norm.bias.copy_(torch.randn(DIM))
    program = apply(model, "fold-affine", args=(x,))
    assert program.history[-1].changed
    assert torch.allclose(program.module(x), model(x), atol=1e-5)


@pytest.mark.parametrize("how", ["sum", "dropped", "axes"])
def test_what_is_no_affine_map_of_the_channels_alone_is_not(how: str) -> None:
    (record,) = apply(Pooled(how), "fold-affine", args=(torch.randn(2, 5, DIM),)).history
    assert not record.changed
    assert "which is no linear layer or convolution" in record.skipped[0].reason


class Channels(nn.Module):
    """A norm of the channels of a map, read by a convolution; ``first`` as timm has it, by a permuted layer otherwise."""

    def __init__(self, reader: nn.Module, *, first: bool = True, kind: str = "layer") -> None:
        super().__init__()
        norm = nn.LayerNorm(DIM) if kind == "layer" else nn.RMSNorm(DIM, eps=1e-5)
        self.norm, self.first, self.reader = norm, first, reader
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.movedim(1, -1)).movedim(-1, 1) if self.first else self.norm(x).movedim(-1, 1)
        out: Tensor = self.reader(y)
        return out


CONVOLUTIONS = {
    "1d": nn.Conv1d(DIM, 4, 3),
    "strided": nn.Conv2d(DIM, 4, 2, stride=2),
    "dilated": nn.Conv2d(DIM, 4, (3, 1), dilation=2),
    "3d": nn.Conv3d(DIM, 4, (1, 2, 2)),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_take_it_summed_over_the_kernel(name: str, first: bool) -> None:
    torch.manual_seed(0)
    model = Channels(copy.deepcopy(CONVOLUTIONS[name]), first=first)
    rank = model.reader.weight.dim() - 2  # type: ignore[union-attr, operator]
    x = torch.randn(2, DIM, *[6] * rank) if first else torch.randn(2, *[6] * rank, DIM)
    result = apply(model, "fold-affine", args=(x,)).module
    weight, old = result.get_submodule("reader").weight, model.reader.weight
    gain, shift = (p.detach() for p in model.norm.parameters())
    assert torch.allclose(weight, old * gain.view(-1, *[1] * rank))  # type: ignore[operator]
    moved = (old.flatten(2).sum(2) @ shift) + model.reader.bias  # type: ignore[operator, union-attr]
    assert torch.allclose(result.get_submodule("reader").bias, moved, atol=1e-5)
    assert sorted(result.state_dict()) == ["reader.bias", "reader.weight"]
    assert torch.allclose(model(x), result(x), atol=1e-4)


UNFOLDED = {
    "padded": (nn.Conv2d(DIM, 4, 3, padding=1), "layer", "reader, which reads it, puts zeros around it"),
    "same": (nn.Conv2d(DIM, 4, 3, padding="same"), "layer", "reader, which reads it, puts zeros around it"),
    "groups": (nn.Conv2d(DIM, 4, 1, groups=2), "layer", "reader reads it, which is no linear layer or convolution"),
    "groups, rms": (nn.Conv2d(DIM, 4, 1, groups=2), "rms", "reader reads it, which is no linear layer or convolution"),
    "no bias": (nn.Conv2d(DIM, 4, 1, bias=False), "layer", "reader, which reads it, has no bias to take its own"),
    "another axis": (nn.Linear(DIM, 4), "layer", "reader reads it along another axis"),
    "transposed": (nn.ConvTranspose2d(DIM, 4, 2), "layer", "reader reads it, which is no linear layer or convolution"),
    "height": (nn.Conv2d(DIM, 4, 1), "layer", "reader reads it along another axis"),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_a_convolution_that_reads_zeros_or_other_channels_leaves_the_norm_alone(name: str) -> None:
    reader, kind, reason = UNFOLDED[name]
    model = Channels(copy.deepcopy(reader), kind=kind)
    if name == "height":
        model.reader = nn.Sequential(Turned(), copy.deepcopy(reader))
        reason = reason.replace("reader", "reader.1")
    (record,) = apply(model, "fold-affine", args=(torch.randn(2, DIM, DIM, DIM),)).history
    assert not record.changed
    assert [skip.reason for skip in record.skipped] == [reason]


class Turned(nn.Module):
    """A map with its channels where the height was."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_a_padded_convolution_takes_a_gain() -> None:
    torch.manual_seed(0)
    model, x = Channels(nn.Conv2d(DIM, 4, 3, padding=1, bias=False), kind="rms"), torch.randn(2, DIM, 5, 5)
    program = apply(model, "fold-affine", args=(x,))
    assert program.history[-1].changed
    assert torch.allclose(program.module(x), model(x), atol=1e-5)
