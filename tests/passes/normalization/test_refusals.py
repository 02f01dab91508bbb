"""Every reason for which a pass of this family leaves a place as it is, by name, on models of a few layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program, RewriteError, apply
from rewrite.pipeline.registry import get_pass, pass_names
from tests.captures import capture
from tests.passes.normalization.test_layerscale import DIM, Block
from tests.passes.normalization.test_rmsnorm import Language, Odd


class Cube(torch.autograd.Function):
    """What no capture sees into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3 * ctx.saved_tensors[0] ** 2


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)  # type: ignore[no-any-return]


class Post(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), norm or nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


class Twice(nn.Module):
    """One norm for the stream and for what it gives, as a pooled output has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.norm = nn.Linear(4, DIM), Block(), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.block(self.embed(x)))
        return y, self.norm(y[:, 0])


class Tokens(nn.Module):
    """A norm of what a linear layer wrote along the tokens, which are transposed: its rows are no hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(5, 3), nn.LayerNorm(DIM), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(x.transpose(1, 2)).transpose(1, 2)))


class Largest(nn.Module):
    """A norm of the largest row, which comes with its place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, DIM), nn.LayerNorm(DIM), nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).max(1).values))


class Pooled(nn.Module):
    """A head that reads the mean of rows that were normalized one by one."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, DIM), norm, nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)).mean(1))


class Shared(nn.Module):
    """An FFN behind a norm; the projection is the embedding's own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


class LastUnit(nn.Module):
    """A head that reads each unit by itself, as some projections start."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


class Doubled(nn.Module):
    """A norm and an activation that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.act(self.norm(x)))))


class Gated(Block):
    """A branch whose norm a gate reads too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(self.up(y).relu() * y.sigmoid())


def rows(width: int = 4) -> Tensor:
    return torch.randn(2, 5, width)


def images(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 6, 6)


Made = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
LINEAR, IDS = functools.partial(nn.Linear, 4, DIM), functools.partial(torch.randint, 11, (2, 6))
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "pre": lambda: [LINEAR(), Block(), nn.LayerNorm(DIM)],
    "post": lambda: [LINEAR(), Post(), Post()],
    "post, rms": lambda: [LINEAR(), Post(nn.RMSNorm(DIM))],
    "scaled": lambda: [LINEAR(), Block(scaled=True)],
    "opaque": lambda: [LINEAR(), Block(), Cubed(), nn.LayerNorm(DIM)],
    "rms": lambda: [LINEAR(), nn.RMSNorm(DIM, 1e-6, elementwise_affine=False), nn.Linear(DIM, 2)],
    "rms, activation": lambda: [LINEAR(), nn.RMSNorm(DIM, 1e-6), nn.GELU()],
    "rms, no eps": lambda: [LINEAR(), nn.RMSNorm(DIM, elementwise_affine=False), nn.Linear(DIM, 2)],
    "no bias": lambda: [LINEAR(), nn.LayerNorm(DIM), nn.Linear(DIM, 2, bias=False)],
    "positions": lambda: [LINEAR(), nn.LayerNorm((5, DIM)), nn.Linear(DIM, 2)],
}
IMAGES: dict[str, Callable[[], list[nn.Module]]] = {
    "batchnorm, activation": lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()],
    "batchnorm, padding": lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)],
    "batchnorm, cumulative": lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU()],
    "groups behind": lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)],
    "overlapping": lambda: [nn.Conv2d(4, 4, 3, stride=2)],
    "single": lambda: [nn.Conv2d(4, 4, 1, groups=4)],
}
MODELS: dict[str, Made] = {
    **{name: (lambda made=made: nn.Sequential(*made()), rows) for name, made in LAYERS.items()},
    **{name: (lambda made=made: nn.Sequential(*made()), images) for name, made in IMAGES.items()},
    "dropout": (functools.partial(Language, p=0.1), IDS),
    "embedding norm": (functools.partial(Language, normed=True), IDS),
    "linear reads": (functools.partial(Odd, "linear"), rows),
    "output reads": (functools.partial(Odd, "output"), rows),
    "convolution": (functools.partial(Odd, "conv"), rows),
    "offset": (functools.partial(Odd, "offset"), rows),
    "cut": (functools.partial(Odd, "cut"), rows),
    "twice": (Twice, rows),
    "tokens": (Tokens, functools.partial(rows, DIM)),
    "largest": (Largest, rows),
    "pooled": (functools.partial(Pooled, nn.RMSNorm(DIM, 1e-6, elementwise_affine=False)), rows),
    "shared": (Shared, functools.partial(rows, DIM)),
    "last unit": (LastUnit, rows),
    "plain": (lambda: nn.Sequential(LINEAR(), nn.ReLU()), rows),
    "batchnorm, twice": (Doubled, images),
    "batchnorm, no positions": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()),
        lambda: torch.randn(3, 4),
    ),
    "gated": (lambda: nn.Sequential(LINEAR(), Block(), Gated()), rows),
}


@functools.cache
def captured(name: str) -> Program:
    build, inputs = MODELS[name]
    return capture(build(), (inputs(),))


class Refusal(NamedTuple):
    """A pass that leaves the place at ``path`` of a model, with ``words`` in its reason."""

    text: str
    model: str
    path: str
    words: str


REFUSALS = [
    Refusal("rmsnorm", "post", "1.norm", "post-norm: 1.up reads the stream too, and is no LayerNorm"),
    Refusal("rmsnorm{centering=keep}", "post", "1.norm", "post-norm"),
    Refusal("rmsnorm", "dropout", "norm", "blocks.0.drop drops single units of the stream in training (p=0.1)"),
    Refusal("rmsnorm", "linear reads", "norm", "side reads the stream too, and is no LayerNorm"),
    Refusal("rmsnorm{centering=keep}", "output reads", "norm", "the model's output reads the stream too"),
    Refusal("rmsnorm{centering=keep}", "convolution", "norm", "conv reads the stream too"),
    Refusal("rmsnorm", "offset", "norm", "adds something that cannot be centered; use centering=keep"),
    Refusal("rmsnorm{centering=keep}", "cut", "norm", "cumsum reads the stream too"),
    Refusal("rmsnorm{centering=keep}", "opaque", "1.norm", "2.Cube reads the stream too, and is no LayerNorm"),
    Refusal("rmsnorm{centering=keep}", "twice", "norm", "the model's output reads the stream too"),
    Refusal("rmsnorm", "tokens", "norm", "mix writes to it, along another axis"),
    Refusal("rmsnorm", "largest", "norm", "writes to it, which is no linear layer"),
    Refusal("rmsnorm{compressed=true}", "embedding norm", "norm", "first writes to it, which is no linear layer"),
    Refusal("rmsnorm{compressed=true}", "pre", "2", "keeps its weight: the model's output reads it"),
    Refusal("rmsnorm{compressed=true where=1.norm}", "pre", "1.norm", "2 normalizes the same dimension, and is not to be"),
    Refusal("rmsnorm{compressed=true}", "last unit", "norm", "the others it would be rounded 6 times as much"),
    Refusal("layernorm", "rms", "1", "0 writes to the stream with a mean; mode=swap replaces it all the same"),
    Refusal("layernorm", "rms, no eps", "1", "no eps of its own"),
    Refusal("dyt,layernorm", "pre", "2", "a DynamicTanh is another function; mode=swap puts a LayerNorm in its place"),
    Refusal("fold-affine", "pre", "2", "the model's output reads it, which is no linear layer or convolution"),
    Refusal("fold-affine", "no bias", "1", "2, which reads it, has no bias to take its own"),
    Refusal("fold-affine", "shared", "norm", "shares its weight with embed.weight"),
    Refusal("fold-affine", "positions", "1", "it normalizes more than one axis"),
    Refusal("fold-affine", "twice", "norm", "it is called more than once"),
    Refusal("defer-norm", "pre", "2", "a LayerNorm takes a mean out: rmsnorm before this pass"),
    Refusal("defer-norm", "rms, activation", "1", "it has a weight of its own: fold-affine before this pass"),
    Refusal("defer-norm", "rms, no eps", "1", "it has no eps of its own"),
    Refusal("defer-norm", "pooled", "norm", "mean reads it, which is no linear layer"),
    Refusal("fold-batchnorm", "batchnorm, activation", "1", "0 writes it, which is no convolution or linear layer"),
    Refusal("fold-batchnorm", "batchnorm, padding", "1", "0 writes it, which is no convolution or linear layer"),
    Refusal("fold-batchnorm", "batchnorm, twice", "norm", "it is called more than once"),
    Refusal("rep-batchnorm,merge-norms", "no bias", "1", "its schedule is not over: step 0 of 10000"),
    Refusal("unified-norm,merge-norms", "pre", "2", "the model's output reads it, which is no linear layer"),
    Refusal("power-norm", "positions", "1", "its channels are not the last axis alone"),
    Refusal("unified-norm", "positions", "1", "its channels are not the last axis alone"),
    Refusal("rep-batchnorm", "positions", "1", "its channels are not the last axis alone"),
    Refusal("peri-ln", "post", "1", "it is post-norm, not pre-norm"),
    Refusal("peri-ln", "scaled", "1", "what it adds is scaled behind it"),
    Refusal("deepnorm", "pre", "1", "its norm does not stand behind the sum: it is pre-norm"),
    Refusal("deepnorm", "post, rms", "1", "has no eps that can be set"),
    Refusal("normformer", "post", "1", "it is post-norm, not pre-norm"),
    Refusal("gpas", "post", "1", "a norm follows the sum, which takes every scale out"),
    Refusal("gpas,gpas", "pre", "1", "it is there already"),
    Refusal("layerscale", "scaled", "1", "what it adds is scaled already"),
    Refusal("rezero", "scaled", "1", "what it adds is scaled already"),
    Refusal("norm-scaling,norm-scaling", "two blocks", "2.norm", "it is scaled already"),
    Refusal("norm-scaling", "gated", "2.norm", "sigmoid reads it, which is no linear layer"),
    Refusal("dual-patchnorm", "overlapping", "0", "its patches overlap, are padded or fall into groups"),
    Refusal("weight-standardization", "single", "0", "each output channel reads a single number"),
    Refusal("ghost-batchnorm", "batchnorm, cumulative", "1", "its running statistics are a cumulative average"),
    Refusal("instance-batch-norm", "batchnorm, cumulative", "1", "it has no running statistics with a momentum"),
    Refusal("batch-channel-norm", "groups behind", "1", "a GroupNorm is behind it"),
    Refusal("batch-channel-norm", "batchnorm, twice", "norm", "it is called more than once"),
    Refusal("online-norm", "batchnorm, twice", "norm", "it is called more than once"),
    Refusal("evonorm", "batchnorm, padding", "1", "something else reads it than one activation"),
    Refusal("evonorm", "batchnorm, twice", "norm", "it is called more than once"),
    Refusal("evonorm", "batchnorm, no positions", "1", "its input has no positions to take statistics of"),
    Refusal("evonorm", "batchnorm, cumulative", "1", "it has no running statistics"),
]
MODELS["two blocks"] = (lambda: nn.Sequential(LINEAR(), Block(), Block()), rows)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r.text}, {r.model}")
def test_a_place_is_left_alone_with_its_reason(refusal: Refusal) -> None:
    record = apply(captured(refusal.model), refusal.text, verify=False).history[-1]
    reasons = {skip.path: skip.reason for skip in record.skipped}
    assert refusal.words in reasons[refusal.path]
    assert refusal.path not in {site.path for site in record.changes}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rmsnorm{compressed=true centering=keep}", "needs mode=exact and centering=bake"),
        ("rezero{init=0}", "a gain of 0 takes all; mode=new allows it"),
        ("dyt{calibrate=lsq}", r"dyt\{calibrate=lsq\} needs data: apply"),
        ("peri-ln{calibrate=rms}", r"peri-ln\{calibrate=rms\} needs data: apply"),
        ("rmsnorm{where=nothing}", "nothing"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error(text: str, words: str) -> None:
    with pytest.raises(RewriteError, match=words):
        apply(captured("pre"), text, verify=False)


FAMILY = [name for name in pass_names() if ".normalization." in get_pass(name).__module__]


@pytest.mark.parametrize("name", FAMILY)
def test_a_model_without_a_place_is_told_what_it_lacks(name: str) -> None:
    record = apply(captured("plain"), name, verify=False).history[-1]
    assert [(skip.path, skip.reason) for skip in record.skipped] == [("", get_pass(name).absence)]


def test_float16_overflows_before_it_is_scaled() -> None:
    model = nn.Sequential(*LAYERS["rms"]()).half()
    with pytest.raises(RewriteError, match="in float16 what reads 1 overflows before it is scaled: use bfloat16"):
        apply(model, "defer-norm", args=(rows().half(),), verify=False)
