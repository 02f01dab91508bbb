"""rmsnorm: the models the kit tries it on, each way of writing to a stream, and each reason to refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from rewrite import Program, apply
from rewrite.graph.history import Record
from rewrite.pipeline.compressing import CRMSNorm
from rewrite.testing import FreshProcess, check_pass
from tests.passes.table import Row

ROWS = [
    Row("rmsnorm", "vit", 18),
    Row("rmsnorm", "bert", 5, near_miss={"encoder.layer.0.output.LayerNorm": "post-norm"}),
    Row("rmsnorm", "gpt2", 0),
    Row("rmsnorm", "llama", 0),
    Row("rmsnorm", "t5", 0),
    Row("rmsnorm", "resnet18", 0),
    Row("rmsnorm{mode=swap}", "gpt2", 5),
    Row("rmsnorm{centering=keep}", "gpt2", 11),
    Row("rmsnorm{centering=keep}", "LayerNormByHand", 9),
]
DIM = 8


class Block(nn.Module):
    def __init__(self, p: float = 0.0, scaled: bool = False) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(DIM), nn.Dropout(p)
        self.up, self.down = nn.Linear(DIM, 16), nn.Linear(16, DIM)
        self.scale = nn.Parameter(torch.rand(DIM)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(x))))
        return x + self.drop(y if self.scale is None else y * self.scale)


def moved(model: nn.Module) -> nn.Module:
    """The model with parameters away from 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def rewritten(model: nn.Module, x: Any, text: str = "rmsnorm") -> tuple[Program, Record]:
    result = apply(moved(model), text, args=(x,))
    return result, result.history[-1]


def layer_norms(program: Program) -> list[str]:
    return [str(node.target) for node, layer in program.layers() if isinstance(layer, nn.LayerNorm)]


def skipped(record: Record) -> dict[str, str]:
    return {skip.path: skip.reason for skip in record.skipped}


class Vision(nn.Module):
    """Patches, a class token, positions and blocks; LayerScale where ``scaled``."""

    def __init__(self, scaled: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 2, 2)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, 5, DIM))
        self.blocks = nn.Sequential(Block(scaled=scaled), Block(scaled=scaled))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_vision_transformer(scaled: bool) -> None:
    model, x = Vision(scaled), torch.randn(2, 3, 4, 4)
    result, record = rewritten(model, x)
    assert layer_norms(result) == []
    assert torch.allclose(result.module(x), model(x), atol=1e-5)
    state = result.module.state_dict()
    assert state["patches.weight"].mean(0).abs().max() < 1e-6
    assert state["token"].mean(-1).abs().max() < 1e-6
    assert state["blocks.1.down.weight"].mean(0).abs().max() < 1e-6
    assert [name for name in state if name.endswith("scale")] == []
    assert record.warnings == ()


class Language(nn.Module):
    """Embeddings with a tied head, and a norm behind the embedding where ``normed``."""

    def __init__(self, normed: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, DIM, padding_idx=0), nn.Embedding(6, DIM)
        self.first = nn.LayerNorm(DIM) if normed else nn.Identity()
        self.blocks, self.norm = nn.Sequential(Block(p), Block(p)), nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(self.first(x))))


def test_a_tied_head_is_untied_and_that_is_said() -> None:
    model, ids = Language(), torch.randint(11, (2, 6))
    result, record = rewritten(model, ids)
    assert layer_norms(result) == []
    assert torch.allclose(result.module(ids), model(ids), atol=1e-5)
    assert record.warnings == ("embed.weight is centered, and no longer shared with head.weight",)
    assert torch.equal(result.module.get_parameter("head.weight"), model.embed.weight)
    assert result.module.get_parameter("embed.weight").mean(-1).abs().max() < 1e-6


def test_a_norm_behind_the_embedding_is_centered_by_a_layer() -> None:
    model, ids = Language(normed=True), torch.randint(11, (2, 6))
    result, record = rewritten(model, ids)
    assert layer_norms(result) == []
    assert [str(n.target) for n, layer in result.layers() if type(layer).__name__ == "Center"] == ["first_center"]
    assert torch.allclose(result.module(ids), model(ids), atol=1e-5)
    assert record.warnings == ("embed.weight is centered, and no longer shared with head.weight",)


class Odd(nn.Module):
    """A block whose stream is also read or written in another way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.block, self.embed = how, Block(), nn.Linear(4, DIM)
        self.norm, self.side = nn.LayerNorm(DIM), nn.Linear(DIM, 2)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: Tensor) -> Any:
        x = self.block(self.embed(x))
        if self.how == "conv":
            x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.how == "offset":
            x = x + 1.0
        if self.how == "cut":
            x = x + x.cumsum(-1)
        y = self.norm(x)
        if self.how == "output":
            return y, x
        return (y, self.side(x)) if self.how == "linear" else y


def test_some_norms_of_a_stream_may_stay() -> None:
    model, x = Vision(), torch.randn(2, 3, 4, 4)
    result, _ = rewritten(model, x, "rmsnorm{where=blocks.0.norm}")
    assert layer_norms(result) == ["blocks.1.norm", "norm"]
    assert torch.allclose(result.module(x), model(x), atol=1e-5)


def test_channels_first() -> None:
    class Norm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv, self.out = Norm2d(6), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(F.gelu(self.conv(self.norm(x))))

    model, x = (
        nn.Sequential(nn.Conv2d(3, 6, 1), Residual(), Residual(), Norm2d(6), nn.Conv2d(6, 2, 1)),
        torch.randn(2, 3, 5, 5),
    )
    result, record = rewritten(model, x)
    assert layer_norms(result) == []
    assert record.changed
    assert torch.allclose(result.module(x), model(x), atol=1e-5)


def test_gradients_stay_those_of_the_old_model_in_every_parameter_that_is_kept() -> None:
    model, ids = Language().double(), torch.randint(11, (2, 6))
    result, _ = rewritten(model, ids)
    result.module(ids).square().sum().backward()
    model(ids).square().sum().backward()
    for name in ("blocks.0.up.weight", "norm.weight", "norm.bias", "blocks.1.norm.weight"):
        ours, theirs = result.module.get_parameter(name).grad, model.get_parameter(name).grad
        assert torch.allclose(ours, theirs, atol=1e-9)
    shared = model.embed.weight.grad
    centered = result.module.get_parameter("embed.weight").grad
    pulled = centered - centered.mean(-1, keepdim=True)
    assert torch.allclose(pulled + result.module.get_parameter("head.weight").grad, shared, atol=1e-9)


@pytest.mark.parametrize("normed", [False, True])
def test_kept_centering_trains_as_the_layer_norm_model_does(normed: bool) -> None:
    """Five steps of AdamW in float64, dropout and a tied head included: the same parameters to 1e-9."""
    model, ids = moved(Language(normed, p=0.25)).double(), torch.randint(11, (2, 6))
    result, record = rewritten(model, ids, "rmsnorm{centering=keep}")
    assert layer_norms(result) == []
    assert record.warnings == ()
    assert list(result.module.state_dict()) == list(model.state_dict())
    modules = (model.train(), result.module.train())
    for module in modules:
        optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
        for number in range(5):
            torch.manual_seed(number)
            optimizer.zero_grad()
            F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
    ours, theirs = (module.state_dict() for module in modules)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-9


class Grouped(nn.Module):
    """A convolution whose output channels read inputs of their own: its weights' mean is not that of what it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 9, 3, padding=1, groups=3), nn.LayerNorm(9)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


KEEPING = [Vision(scaled=True), Grouped(), Odd("offset"), nn.Sequential(nn.Linear(4, DIM), Block(0.5), nn.LayerNorm(DIM))]


@pytest.mark.parametrize("model", KEEPING)
def test_kept_centering_takes_scales_offsets_and_dropouts(model: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4) if isinstance(model, Vision | Grouped) else torch.randn(2, 5, 4)
    result, record = rewritten(model.eval(), x, "rmsnorm{centering=keep}")
    assert layer_norms(result) == []
    assert torch.allclose(result.module.eval()(x), model(x), atol=1e-5)
    assert dict(result.module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert record.skipped == ()


@pytest.mark.parametrize("model", [Vision(), Vision(scaled=True), Language()])
def test_compressed_streams_have_a_unit_less(model: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4) if isinstance(model, Vision) else torch.randint(11, (2, 6))
    result, record = rewritten(model, x, "rmsnorm{compressed=true}")
    assert record.skipped == ()
    assert [type(layer) for _, layer in result.layers() if type(layer).__name__.endswith("Norm")] == [CRMSNorm] * 3
    state = result.module.state_dict()
    assert state["blocks.1.down.weight"].shape == (DIM - 1, 16)
    assert state["blocks.1.up.weight"].shape == (16, DIM - 1)
    assert state["head.weight"].shape[1] == DIM - 1
    assert "head.bias" in state  # the norm's bias, where the head had none
    assert torch.allclose(result.module(x), model(x), atol=1e-5)


def test_crmsnorm_is_the_rmsnorm_of_all_units() -> None:
    z = torch.randn(3, DIM - 1, dtype=torch.float64)
    x = torch.cat([z, -z.sum(-1, keepdim=True)], -1)
    assert torch.allclose(CRMSNorm(1e-5)(z), F.rms_norm(x, (DIM,), eps=1e-5)[:, :-1], rtol=0, atol=1e-15)


def test_a_compressed_model_through_the_kit(fresh_process: FreshProcess) -> None:
    torch.manual_seed(0)
    model, ids = moved(Language()).eval(), torch.randint(11, (2, 6))
    check_pass("rmsnorm{compressed=true}", model, (ids,), changes=23, process=fresh_process)
