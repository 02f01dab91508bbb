"""Small modules, each written to break a tool that captures, lifts or rewrites models.

A class is one obstacle, and its docstring says why it is hard. All of them run in eager mode, trained and
evaluated, at any batch size above 1 and (where they read a sequence) at any length up to `MAX_LENGTH`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .zoo import Case, Inputs, seeded

DIM = 8
VOCAB = 13
MAX_LENGTH = 32

_CASES: list[Case] = []

#: Cases whose output is random in eval mode too, so that two calls differ unless they share a seed.
RANDOM_IN_EVAL = frozenset({"FunctionalDropoutAlwaysOn", "NoiseInBothModes"})

#: Cases that a forward in eval mode changes (a buffer, a weight or an input), so that two calls may differ.
MUTATED_IN_EVAL = frozenset({"CallCounter", "EmbeddingMaxNorm", "MutatesItsInput"})

#: Cases that eager PyTorch itself cannot run once cast to bfloat16; `AutocastOff` fails in float64 too.
FLOAT32_ONLY = frozenset({"AutocastOff", "ConstantAttribute"})

#: Cases that `torch.export` itself rejects in training mode; the first two can be captured in eval mode.
REJECTED_BY_EXPORT = frozenset({"LayerDrop", "BatchNormCumulative", "DataDependentBranch", "UnregisteredOutput"})


def stress_cases() -> list[Case]:
    """Every stress module, in the order of this file."""
    return list(_CASES)


def stress(inputs: Inputs) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: the class, built with seed 0 and fed by `inputs`, is a stress case by its own name."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        _CASES.append(Case(cls.__name__, seeded(cls), inputs, "stress"))
        return cls

    return register


# -------------------- inputs --------------------------------------------------------------------------------


def _generator(batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * batch + length)


def vectors(batch: int, length: int) -> tuple[tuple, dict]:
    """One float tensor [batch, DIM]."""
    return (torch.randn(batch, DIM, generator=_generator(batch, 0)),), {}


def sequences(batch: int, length: int) -> tuple[tuple, dict]:
    """One float tensor [batch, length, DIM]."""
    return (torch.randn(batch, length, DIM, generator=_generator(batch, length)),), {}


def images(batch: int, length: int) -> tuple[tuple, dict]:
    """One float tensor [batch, DIM, 6, 6]."""
    return (torch.randn(batch, DIM, 6, 6, generator=_generator(batch, 0)),), {}


def tokens(batch: int, length: int) -> tuple[tuple, dict]:
    """One integer tensor [batch, length]; token 0 stands for padding and closes every row."""
    ids = torch.randint(1, VOCAB, (batch, length), generator=_generator(batch, length))
    ids[:, -1] = 0
    return (ids,), {}


# -------------------- branches on the mode ------------------------------------------------------------------


@stress(vectors)
class TrainingBranchInRoot(nn.Module):
    """Export bakes one branch of `if self.training` and marks nothing; the root itself has no enclosing
    module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.auxiliary = nn.Linear(DIM, DIM)
        self.last = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x + torch.tanh(self.auxiliary(x))
        return self.last(x)


class _TrainingBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2 if self.training else self.linear(x).relu()


@stress(vectors)
class TrainingBranchInChild(nn.Module):
    """Only the child differs between the modes: the layers around it must stay visible to passes."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        self.child = _TrainingBranch()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.child(self.before(x)))


@stress(vectors)
class OtherLayerInEval(nn.Module):
    """A layer that only the eval graph reaches looks unused in a capture made in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)
        self.train_head = nn.Linear(DIM, 3)
        self.eval_head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        head = self.train_head if self.training else self.eval_head
        return head(self.body(x).relu())


@stress(vectors)
class OtherStructureInEval(nn.Module):
    """A pair in training, one tensor in eval (distilled DeiT): the two modes have different output trees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 3)
        self.head_dist = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2


@stress(vectors)
class MovingAverageInTraining(nn.Module):
    """A buffer written only in training: a capture in one mode alone loses the write or keeps it in eval."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("average", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.average


@stress(vectors)
class RebindsItsBuffer(nn.Module):
    """The buffer is assigned a new tensor, not written in place: the write is an attribute store, no op."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("scale", torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean(0)
        return x / self.scale


@stress(images)
class BatchStatisticsByHand(nn.Module):
    """Batch norm without the op: batch statistics in training, running ones in eval."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, DIM).view(1, DIM, 1, 1))
        self.register_buffer("mean", torch.zeros(1, DIM, 1, 1))
        self.register_buffer("var", torch.ones(1, DIM, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach(), 0.1)
        else:
            mean, var = self.mean, self.var
        return self.weight * (x - mean) / (var + 1e-5).sqrt()


@stress(vectors)
class CallCounter(nn.Module):
    """An integer buffer moves at every call, in eval too, and the output depends on it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / self.calls


# -------------------- random layers -------------------------------------------------------------------------


@stress(vectors)
class GuardedDropout(nn.Module):
    """Dropout that eval never calls: captured in training it is an op whose `train` argument reads True for
    ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.training:
            x = F.dropout(x, 0.3)
        return x


@stress(vectors)
class FunctionalDropout(nn.Module):
    """`training=self.training` is a bool that tracing bakes, and there is no module to carry the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), p=0.3, training=self.training)


@stress(vectors)
class FunctionalDropoutAlwaysOn(nn.Module):
    """Monte Carlo dropout: the same op as `FunctionalDropout` when traced in training, yet it must stay on in
    eval.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), p=0.3, training=True)


@stress(images)
class RareDropouts(nn.Module):
    """Four other dropout ops, of which two have no module in the model; one works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 1)
        self.alpha = nn.AlphaDropout(0.2)
        self.channels = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(self.alpha(self.conv(x)))
        x = F.feature_alpha_dropout(x, 0.2, self.training)
        return F.dropout(x + 1, 0.2, self.training, inplace=True)


@stress(vectors)
class DropoutOfRateZero(nn.Module):
    """Rate 0 hands its very input on, which is used beside it, and the user may raise `p` later; rate 1 gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.off = nn.Dropout(0.0)
        self.linear = nn.Linear(DIM, DIM)
        self.all = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.off(x)) + x
        return x + self.all(x)


@stress(sequences)
class StochasticDepthByHand(nn.Module):
    """Whole rows are dropped by `bernoulli_` on a fresh tensor, under an early return that eval takes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(DIM, DIM)

    def drop(self, x: Tensor, rate: float = 0.5) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - rate)
        return x * mask / (1 - rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


@stress(sequences)
class LayerDrop(nn.Module):
    """A layer is skipped when a drawn number says so (wav2vec2): the training graph depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or torch.rand([]) > 0.5:
                x = x + layer(x).tanh()
        return x


@stress(vectors)
class NoiseInBothModes(nn.Module):
    """Random in eval as well: no capture may freeze the noise, and it must be drawn afresh at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 0.1 * torch.randn_like(x))


@stress(vectors)
class NoiseInTraining(nn.Module):
    """A noisy router: `rand_like` has no training flag to look at, only a Python branch around it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 4)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            logits = logits + torch.rand_like(logits)
        gates = logits.softmax(-1)
        return torch.stack([gates[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)


@stress(sequences)
class Recurrent(nn.Module):
    """`lstm` and `gru` carry a `train` literal for their dropout, and their weights are a flat list."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(DIM, DIM, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * DIM, DIM, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(x)
        return self.gru(x)[0], state


@stress(sequences)
class AttentionDropout(nn.Module):
    """`dropout_p` of scaled_dot_product_attention is a float that tracing bakes, in a call that has no
    module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, DIM // 2)).permute(2, 0, 3, 1, 4)
        rate = 0.2 if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))


@stress(sequences)
class PackedAttention(nn.Module):
    """nn.MultiheadAttention: packed projection as free parameters, dropout, weights returned, a fast path in
    eval.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, dropout=0.1, batch_first=True)
        self.silent = nn.MultiheadAttention(DIM, 2, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return self.silent(y, x, x, need_weights=False)[0], weights


@stress(sequences)
class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer takes one fused op in eval without gradients, another path elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# -------------------- batch norm ----------------------------------------------------------------------------


@stress(images)
class BatchNormTwice(nn.Module):
    """Two calls of one BatchNorm: the running mean moves twice and `num_batches_tracked` counts two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1)
        self.bn = nn.BatchNorm2d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(x).relu()))


@stress(images)
class ResidualConvolutions(nn.Module):
    """A residual block of convolutions, BatchNorms and activations, as residual networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(DIM, DIM, 3, padding=1, bias=False) for _ in range(3))
        self.bn0, self.bn1, self.bn2 = (nn.BatchNorm2d(DIM) for _ in range(3))
        self.act0, self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.bn0(self.stem(x)))
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.head(self.act2(x + y).mean((2, 3)))


@stress(images)
class TwoConvolutions(nn.Module):
    """Two convolutions with nothing between them, and two more the second of which pads."""

    def __init__(self) -> None:
        super().__init__()
        self.spread, self.gather = nn.Conv2d(DIM, 3, 3, padding=1), nn.Conv2d(3, DIM, (1, 2), bias=False)
        self.act, self.first, self.second = nn.ReLU(), nn.Conv2d(DIM, DIM, 3), nn.Conv2d(DIM, 2, (3, 2), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.act(self.gather(self.spread(x)))))


@stress(images)
class BatchNormCumulative(nn.Module):
    """`momentum=None` divides by the number of batches seen, a float read from a buffer: export fails."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 1)
        self.bn = nn.BatchNorm2d(DIM, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@stress(images)
class BatchNormVariants(nn.Module):
    """No running statistics (batch ones in eval too), no affine, a 1d norm, and a subclass with an
    activation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stateless = nn.BatchNorm2d(DIM, track_running_stats=False)
        self.plain = nn.BatchNorm2d(DIM, affine=False)
        self.active = _BatchNormRelu(DIM)
        self.flat = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.active(self.plain(self.stateless(x))).mean((2, 3)))


class _BatchNormRelu(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@stress(images)
class FrozenBatchNorm(nn.Module):
    """`train` is overridden to leave one norm in eval: its statistics must not move in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(DIM, DIM, 1)
        self.frozen = nn.BatchNorm2d(DIM)
        self.moving = nn.BatchNorm2d(DIM)
        self.train()

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.moving(self.conv(self.frozen(x)))


# -------------------- sharing and naming --------------------------------------------------------------------


@stress(vectors)
class CalledTwice(nn.Module):
    """One layer, two calls: an edit of one call is not an edit of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(self.linear(self.norm(x)).relu()))


@stress(vectors)
class SharedUnderTwoNames(nn.Module):
    """Two paths, one module: state_dict has both keys, `named_parameters` one, and the tie must survive
    copies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM))
        self.second = nn.ModuleDict({"again": self.first, "norm": self.first[1]})

    def forward(self, x: Tensor) -> Tensor:
        return self.second["norm"](x + self.second["again"](self.first(x)))


@stress(tokens)
class TiedHead(nn.Module):
    """The head's weight is the embedding's: one tensor read by two kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(ids)))


@stress(tokens)
class BorrowedWeight(nn.Module):
    """A weight used outside its module, transposed and by `F.linear`: the module that owns it is not called
    there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(self.linear(self.embedding(ids)), self.linear.weight.t())
        return x @ self.embedding.weight.t()


class _WithHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(DIM))
        self.norm = nn.LayerNorm(DIM)

    def project(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("only project is called")


@stress(vectors)
class MethodOfChild(nn.Module):
    """A child is used through a method that is not `forward`: no module stack entry names it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = _WithHelper()

    def forward(self, x: Tensor) -> Tensor:
        return self.child.project(x)


@stress(vectors)
class Frozen(nn.Module):
    """Nothing in it is trained, so that autograd keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 3)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


@stress(vectors)
class UnusedParameters(nn.Module):
    """Parameters that no call reads (a free one, a layer, a frozen one, an empty one) belong to the
    state_dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.ones(3))
        self.spare = nn.Linear(DIM, DIM)
        self.used = nn.Linear(DIM, DIM)
        self.used.bias.requires_grad_(False)
        self.empty = nn.Parameter(torch.empty(0, DIM))
        self.register_parameter("none", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@stress(sequences)
class NonPersistentBuffer(nn.Module):
    """A buffer that is no part of the state_dict, beside one that is, and one that is None."""

    table: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("table", torch.linspace(-1, 1, MAX_LENGTH).view(1, MAX_LENGTH, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.scale * self.table[:, : x.shape[1]])


@stress(vectors)
class ConstantAttribute(nn.Module):
    """Tensors that are plain attributes: neither parameters nor buffers, in no state_dict, and `.to()` skips
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.shift = torch.linspace(0, 1, DIM)
        self.scales = [torch.full((DIM,), 2.0), torch.full((DIM,), 0.5)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x + self.shift)
        for scale in self.scales:
            x = (x * scale).tanh()
        return x


@stress(vectors)
class ParameterContainers(nn.Module):
    """ParameterList and ParameterDict are modules without a forward; their keys are digits and arbitrary
    words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList([torch.randn(DIM), torch.randn(DIM)])
        self.scales = nn.ParameterDict({"in": torch.rand(DIM), "out": torch.rand(DIM)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.scales["in"] * x + self.shifts[0]
        return self.scales["out"] * x.relu() + self.shifts[1]


@stress(vectors)
class AwkwardNames(nn.Module):
    """Names that are Python keywords, hold a dash, look like another's suffix or like a node of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM)
        self.layer_1 = nn.Linear(DIM, DIM)
        self.add = nn.Linear(DIM, DIM)
        self.x = nn.Linear(DIM, DIM)
        self.by_name = nn.ModuleDict({"a-b": nn.Linear(DIM, DIM), "class": nn.LayerNorm(DIM), "1": nn.Linear(DIM, DIM)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_1(self.layer(x)) + self.add(self.x(x))
        for module in self.by_name.values():
            x = module(x)
        return x


@stress(sequences)
class PythonLoop(nn.Module):
    """Which layers run is decided in Python: every second one, backwards, the last of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.activations = nn.ModuleDict({"even": nn.GELU(), "odd": nn.SiLU()})

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(reversed(self.layers[::2])):
            for _ in range(index + 1):
                x = x + self.activations["odd" if index % 2 else "even"](layer(x))
        return x


# -------------------- computed weights ----------------------------------------------------------------------


class _ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input) - input


class _StandardizedConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / std, self.bias, padding=self.padding)


@stress(images)
class MisleadingSubclasses(nn.Module):
    """`isinstance(m, nn.Linear)` holds and the forward is another: a scaled linear, a conv that rewrites its
    weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = _StandardizedConv(DIM, DIM, 3, padding=1)
        self.linear = _ScaledLinear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


@stress(vectors)
class WeightNormByHook(nn.Module):
    """The old weight_norm: a pre-hook sets `weight`, which is a plain attribute, from `weight_g` and
    `weight_v`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.weight_norm(nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@stress(vectors)
class WeightNormParametrized(nn.Module):
    """A parametrization makes `weight` a property of a class made on the fly, and renames the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@stress(vectors)
class SpectralNormParametrized(nn.Module):
    """Power iteration under no_grad writes buffers in training only, in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@stress(vectors)
class SpectralNormByHook(nn.Module):
    """The old spectral_norm: a pre-hook that iterates, writes buffers and sets an attribute, in training
    only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@stress(sequences)
class ConcatenatedBias(nn.Module):
    """One linear of a free weight and a bias put together from parameters and a zero buffer (BEiT, EVA)."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * DIM, DIM) / DIM**0.5)
        self.q_bias = nn.Parameter(torch.ones(DIM))
        self.v_bias = nn.Parameter(torch.ones(DIM))
        self.register_buffer("zero", torch.zeros(DIM), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.zero, self.v_bias))
        return torch.cat(F.linear(x, self.weight, bias).chunk(3, -1)[::-1], -1)


# -------------------- gradients -----------------------------------------------------------------------------


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None


class _ClippedSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 * x).clamp(-1, 1)


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _ClippedSquare.apply(x)


@stress(vectors)
class StraightThrough(nn.Module):
    """A custom autograd.Function: tracing keeps `round`, whose true gradient is zero, and no forward test
    sees it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_RoundStraightThrough.apply(4 * self.linear(x)))


@stress(vectors)
class ReversedGradient(nn.Module):
    """The identity with another backward (domain adversarial training), called by the root beside ordinary
    ops.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, 3)
        self.domain = nn.Linear(DIM, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return self.head(x), self.domain(_ReverseGradient.apply(x, 0.5))


@stress(vectors)
class CustomFunctionInChild(nn.Module):
    """The custom backward sits in a small child (Bloom's GELU) and reads a saved tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.square = _Square()

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.linear(x))


@stress(vectors)
class NoGradient(nn.Module):
    """A teacher under `no_grad`, a detached target: gradients must not flow there, though all weights require
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(DIM, DIM)
        self.teacher = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        y = self.student(x)
        return self.head(y) * target, y - y.mean(-1, keepdim=True).detach()


@stress(vectors)
class NoGradientByDecorator(nn.Module):
    """A method under `@torch.no_grad()`, and `enable_grad` inside it: nested switches of one state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.outer = nn.Linear(DIM, DIM)

    @torch.no_grad()
    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        frozen = self.outer(x)
        with torch.enable_grad():
            return frozen, self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        frozen, live = self.scores(x)
        return self.outer(frozen * live)


@stress(sequences)
class Checkpointed(nn.Module):
    """Export drops the checkpoint: values stay equal and the memory saving is lost without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + checkpoint(self.block, x, use_reentrant=False)
        return x + self.block(x)


@stress(vectors)
class ZeroHead(nn.Module):
    """The head is zero at the start, and so is a layer scale: a wrong body cannot be seen in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.scale = nn.Parameter(torch.zeros(DIM))
        self.head = nn.Linear(DIM, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.scale * self.norm(self.body(x)))


# -------------------- devices and dtypes --------------------------------------------------------------------


@stress(sequences)
class AutocastOff(nn.Module):
    """A region that leaves autocast: inlined, it would run in the low precision of the caller's autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.router = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = self.router(x.float()).softmax(-1)
        return self.linear(x) * scores.sum(-1, keepdim=True).to(x.dtype)


@stress(sequences)
class AutocastOn(nn.Module):
    """A region in bfloat16 inside a float32 model, as context and as decorator: the casts have no line of
    code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Linear(DIM, DIM)
        self.exact = nn.Linear(DIM, DIM)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def product(self, x: Tensor, y: Tensor) -> Tensor:
        return x @ y.transpose(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            y = self.fast(x)
        y = self.exact(y.to(x.dtype))
        return self.product(x, y).to(x.dtype) @ y


@stress(sequences)
class DeviceLiterals(nn.Module):
    """Tensors made in the forward, with the input's device in four spellings: tracing bakes it."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(MAX_LENGTH, DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        x = x + self.position(torch.arange(length, device=x.device))
        x = torch.cat((x.new_zeros(batch, 1, DIM), x), 1)
        causal = torch.ones(length + 1, length + 1, device=x.device).tril()
        return self.linear(causal.to(x.dtype) @ x) + torch.tensor([1.0] * DIM).to(x)


@stress(sequences)
class DtypeLiterals(nn.Module):
    """Some dtypes follow the model (the mask's minimum, the cast back), some do not (softmax in float32)."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        length = x.shape[1]
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        scores = q @ k.transpose(1, 2) / math.sqrt(DIM) + mask
        return scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ x


@stress(vectors)
class MixedDtypes(nn.Module):
    """Layers in bfloat16 between layers in float32: the casts belong to the model and `.double()` moves them
    all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(DIM, DIM, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.low(x.to(self.low.weight.dtype)).to(self.norm.weight.dtype))


# -------------------- mutation and aliasing -----------------------------------------------------------------


@stress(sequences)
class WritesThroughViews(nn.Module):
    """In-place writes to a view change the tensor that is read afterwards: nothing in the graph uses their
    result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.token = nn.Parameter(torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x[:, 0] += self.token
        x[..., 1:3].mul_(2)
        x.view(-1, DIM)[:, 3].zero_()
        x[x > 2] = 2
        return x.transpose(1, 2).add_(1)


@stress(vectors)
class WritesActivations(nn.Module):
    """In-place activations and residual adds; an eliminator of dead code deletes the calls whose result is
    unused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.first(x))
        residual = self.second(y)
        residual += x
        residual.mul_(0.5)
        F.leaky_relu_(residual, 0.1)
        return residual


@stress(vectors)
class MutatesItsInput(nn.Module):
    """The caller sees the write: an edit that copies the input first changes what the model does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x.clamp_(min=0)
        return self.linear(x)


@stress(vectors)
class AliasedOutputs(nn.Module):
    """Returns its input, a parameter, one tensor twice, a view of it, a number and None."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.linear(x)
        return x, self.linear.weight, y, y, y.view(-1), 7, None


# -------------------- signatures ----------------------------------------------------------------------------


@dataclass
class Batch:
    """An input registered with pytree."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass
class Scores:
    """An output registered with pytree."""

    logits: Tensor
    loss: Tensor | None = None


@dataclass
class Loose:
    """An output that pytree does not know."""

    logits: Tensor


class Pair(NamedTuple):
    """An output that is a tuple with names."""

    first: Tensor
    second: Tensor


torch.export.register_dataclass(Batch, serialized_type_name="rewrite.tests.Batch")
torch.export.register_dataclass(Scores, serialized_type_name="rewrite.tests.Scores")


def _nested(batch: int, length: int) -> tuple[tuple, dict]:
    (x,), _ = sequences(batch, length)
    return ({"a": x, "more": [x + 1, (x - 1, {"deep": x * 2})]},), {}


@stress(_nested)
class NestedContainers(nn.Module):
    """Dicts in lists in dicts, in and out, with the output's keys in an order that is not sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        second, (third, rest) = features["more"]
        y = self.linear(features["a"] + second)
        return {"z": Pair(y, third), "a": [y + 1, {"deep": rest["deep"] * y}], "empty": ()}


def _dataclass(batch: int, length: int) -> tuple[tuple, dict]:
    (ids,), _ = tokens(batch, length)
    return (Batch(ids, ids != 0),), {}


@stress(_dataclass)
class DataclassIO(nn.Module):
    """Dataclasses registered with pytree, in and out; one field of the output is None."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)

    def forward(self, batch: Batch) -> Scores:
        x = self.embedding(batch.ids)
        return Scores(x if batch.mask is None else x * batch.mask.unsqueeze(-1).to(x.dtype))


@stress(vectors)
class UnregisteredOutput(nn.Module):
    """Returns a dataclass that pytree does not know: export rejects the whole model for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Loose:
        return Loose(self.linear(x))


def _keywords(batch: int, length: int) -> tuple[tuple, dict]:
    (x,), _ = sequences(batch, length)
    return (x,), {"scale": torch.tensor(0.5), "mask": None}


@stress(_keywords)
class KeywordOnly(nn.Module):
    """Keyword-only, defaulted, None and flag arguments; the flag picks a path and is a constant once
    captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(
        self, x: Tensor, *, scale: Tensor, mask: Tensor | None = None, normalize: bool = True, power: int = 2
    ) -> Tensor:
        x = self.linear(x) * scale
        x = x if mask is None else x.masked_fill(mask, 0)
        return self.norm(x) ** power if normalize else x


def _variadic(batch: int, length: int) -> tuple[tuple, dict]:
    (x,), _ = vectors(batch, length)
    return (x, x + 1, x + 2), {"shift": x * 3}


@stress(_variadic)
class Variadic(nn.Module):
    """`*args` and `**kwargs` in the signature of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, *parts: Tensor, **named: Tensor) -> Tensor:
        return self.linear(torch.stack(parts).sum(0)) + named["shift"]


def _two_lengths(batch: int, length: int) -> tuple[tuple, dict]:
    (x,), _ = sequences(batch, length)
    (y,), _ = sequences(batch, length // 2 + 3)
    return (x,), {"context": y}


@stress(_two_lengths)
class TwoLengths(nn.Module):
    """Two inputs with a length each: they must not be taken for one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(DIM, DIM)
        self.key = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(context), context)


@stress(vectors)
class HookedLayers(nn.Module):
    """Hooks that change what a layer receives and returns, one of them on the root: no code calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.first.register_forward_pre_hook(_double_input)
        self.norm.register_forward_hook(_add_input)
        self.register_forward_hook(_negate)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


def _double_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


def _add_input(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + args[0]


def _negate(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return -output


# -------------------- shapes --------------------------------------------------------------------------------


@stress(sequences)
class IntOfShape(nn.Module):
    """`int(x.shape[0])` turns a dynamic batch into a constant, silently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch = int(x.shape[0])
        return self.linear(x).reshape(batch, -1)


@stress(sequences)
class LoopOverLength(nn.Module):
    """A recurrence unrolled over the sequence: its length becomes part of the graph (Mamba's slow path)."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = x.new_zeros(x.shape[0], DIM), []
        for t in range(x.shape[1]):
            state = self.step(torch.cat((x[:, t], state), -1)).tanh()
            outputs.append(state)
        return torch.stack(outputs, 1)


@stress(sequences)
class LengthArithmetic(nn.Module):
    """Padding to a multiple, windows, a positional table cut to length: floor divisions of symbols."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, MAX_LENGTH, DIM))
        self.mix = nn.Linear(4 * DIM, 4 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = F.pad(x + self.position[:, :length], (0, 0, 0, -length % 4))
        windows = x.view(batch, -1, 4 * DIM)
        return self.mix(windows).view(batch, -1, DIM)[:, :length]


@stress(vectors)
class DataDependentBranch(nn.Module):
    """A branch on a value: export cannot capture it, and the error has to name this line."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x.relu() if x.sum() > 0 else x.tanh()


# -------------------- embeddings ----------------------------------------------------------------------------


@stress(tokens)
class PaddingIndex(nn.Module):
    """The row of `padding_idx` gets no gradient, by module and by function; counts scale the gradient of
    another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM, padding_idx=0)
        self.scaled = nn.Embedding(VOCAB, DIM, scale_grad_by_freq=True)
        self.table = nn.Parameter(torch.randn(VOCAB, DIM))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) + F.embedding(ids, self.table, padding_idx=0) * self.scaled(ids)


@stress(tokens)
class EmbeddingMaxNorm(nn.Module):
    """`max_norm` writes the weight in place in the forward, in eval too, and export does not see that op."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM, max_norm=1.0)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embedding(ids))


@stress(tokens)
class BagOfWords(nn.Module):
    """nn.EmbeddingBag: an op with four results and integer modes; one bag per row."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, DIM, mode="mean", padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


# -------------------- normalizations ------------------------------------------------------------------------


class _ChannelsFirstNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@stress(images)
class ChannelsFirstNorms(nn.Module):
    """A LayerNorm subclass that permutes around itself, beside a channel norm that is a GroupNorm of one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _ChannelsFirstNorm(DIM)
        self.conv = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)
        self.one_group = nn.GroupNorm(1, DIM)
        self.groups = nn.GroupNorm(4, DIM)
        self.instance = nn.InstanceNorm2d(DIM, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.instance(self.groups(self.one_group(self.conv(self.norm(x)))))


class _SpelledLayerNorm(nn.Module):
    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.axis = 1 if channels_first else -1
        shape = (DIM, 1, 1) if channels_first else (DIM,)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, DIM).view(shape))
        self.beta = nn.Parameter(torch.linspace(-1, 1, DIM).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(self.axis, keepdim=True)
        var = (x - mean).pow(2).mean(self.axis, keepdim=True)
        return self.gamma * ((x - mean) / torch.sqrt(var + 1e-6)) + self.beta


@stress(images)
class LayerNormByHand(nn.Module):
    """Layer norm in elementary ops, channels first (ConvNeXt's original code) and last; the names are gamma
    and beta.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = _SpelledLayerNorm(channels_first=True)
        self.last = _SpelledLayerNorm(channels_first=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).permute(0, 2, 3, 1))


class _DecoderLayer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(dim, 1e-5), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_norm, self.up, self.down = nn.RMSNorm(dim, 1e-5), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


@stress(tokens)
class PreNormDecoder(nn.Module):
    """A language model whose every dimension can be another: packed projections, RMSNorm, positions by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, DIM), nn.Embedding(MAX_LENGTH, DIM)
        self.layers = nn.ModuleList([_DecoderLayer(DIM), _DecoderLayer(DIM)])
        self.norm, self.head = nn.RMSNorm(DIM, 1e-5), nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@stress(sequences)
class LayerNormNearMisses(nn.Module):
    """Looks like layer norm and is none: unbiased deviation, eps added outside the root, the wrong axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))
        self.bias = nn.Parameter(torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.bias
        return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, unbiased=False, keepdim=True) + 1e-5)


@stress(sequences)
class FunctionalLayerNorm(nn.Module):
    """`F.layer_norm` with free parameters, with a weight alone, with nothing, and over two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, DIM))
        self.beta = nn.Parameter(torch.linspace(-1, 1, DIM))
        self.planes = nn.LayerNorm((2, DIM // 2), elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (DIM,), self.gamma, self.beta, 1e-6)
        x = F.layer_norm(x.square(), (DIM,), self.gamma)
        return self.planes(F.layer_norm(x.exp(), (DIM,)).unflatten(-1, (2, -1))).flatten(2)


class RMSNormSpelling(nn.Module):
    """One spelling of `weight * x / sqrt(mean(x^2) + eps)`; they differ in rounding, and in the order of
    casts.
    """

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        start = torch.linspace(-0.5, 0.5, DIM)
        self.weight = nn.Parameter(start if spelling == "one_plus" else 1 + start)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.spelling}")(x)

    def _llama(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)

    def _cast_last(self, x: Tensor) -> Tensor:
        y = x.float()
        return (self.weight.float() * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6))).to(x.dtype)

    def _one_plus(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)

    def _divided(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * self.weight

    def _power(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).pow(-0.5) * self.weight

    def _summed(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / DIM + 1e-5) * self.weight

    def _weightless(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    def _functional(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (DIM,), self.weight, 1e-5)


@stress(sequences)
class RMSNormSpellings(nn.Module):
    """Eight spellings in a row, the layer of torch, and three near misses, each another function."""

    spellings = ("llama", "cast_last", "one_plus", "divided", "power", "summed", "weightless", "functional")

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({spelling: RMSNormSpelling(spelling) for spelling in self.spellings})
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM) for _ in self.spellings)
        self.torch = nn.RMSNorm(DIM)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms.values(), self.mix, strict=True):
            x = x + linear(norm(x))
        return self.near_misses(self.torch(x))

    def near_misses(self, x: Tensor) -> Tensor:
        x = self.scale * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)
        x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x.abs().mean(-1, keepdim=True) + 1e-5)
