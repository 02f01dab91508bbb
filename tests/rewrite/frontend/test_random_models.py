"""Small random models: whatever the sequence of layers, the program is the model, bit for bit and in both modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from rewrite import capture
from rewrite.numerics.compare import clone
from tests.compare import differences, observe

DIM, LENGTH = 8, 5

#: Each step takes and gives [batch, length, DIM]; it may use its own layer.
STEPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Any, Tensor], Tensor]]] = {
    "linear": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: own(x)),
    "residual": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: x + own(x)),
    "residual in place": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: own(x).add_(x)),
    "layer norm": (lambda: nn.LayerNorm(DIM), lambda m, own, x: own(x)),
    "functional norm": (nn.Identity, lambda m, own, x: F.layer_norm(x, (DIM,))),
    "rms norm": (lambda: nn.RMSNorm(DIM), lambda m, own, x: own(x)),
    "spelled norm": (nn.Identity, lambda m, own, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "batch norm": (lambda: nn.BatchNorm1d(DIM), lambda m, own, x: own(x.transpose(1, 2)).transpose(1, 2)),
    "conv": (lambda: nn.Conv1d(DIM, DIM, 3, padding=1), lambda m, own, x: own(x.transpose(1, 2)).transpose(1, 2)),
    "dropout": (lambda: nn.Dropout(0.3), lambda m, own, x: own(x)),
    "functional dropout": (nn.Identity, lambda m, own, x: F.dropout(x, 0.3, m.training)),
    "gelu": (nn.GELU, lambda m, own, x: own(x)),
    "relu in place": (lambda: nn.ReLU(inplace=True), lambda m, own, x: own(x * 1)),
    "activation in place": (nn.Identity, lambda m, own, x: F.leaky_relu_(x + 0)),
    "write a slice": (nn.Identity, lambda m, own, x: _written(x)),
    "branch": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: own(x).tanh() if m.training else own(x)),
    "layer of one mode": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: own(x) if m.training else x),
    "noise": (nn.Identity, lambda m, own, x: x + torch.randn_like(x) if m.training else x),
    "reshape": (nn.Identity, lambda m, own, x: x.reshape(x.shape[0], -1).reshape(x.shape).flip(1)),
    "heads": (nn.Identity, lambda m, own, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
    "attention dropout": (
        nn.Identity,
        lambda m, own, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 if m.training else 0.0),
    ),
    "no grad": (lambda: nn.Linear(DIM, DIM), lambda m, own, x: x * _without_grad(own, x)),
    "detach": (nn.Identity, lambda m, own, x: x - x.mean(1, keepdim=True).detach()),
    "scale": (nn.Identity, lambda m, own, x: x / x.shape[1]),
    "mask": (nn.Identity, lambda m, own, x: x.masked_fill(x > 1, 0.0)),
    "counter": (lambda: Counter(), lambda m, own, x: own(x)),
}


class Counter(nn.Module):
    """A buffer that moves in training and is read in both modes."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.5)
        return x - self.mean


def _written(x: Tensor) -> Tensor:
    x = x + 0
    x[:, 0] = 0
    x[..., 1].mul_(2)
    return x


def _without_grad(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


class Random(nn.Module):
    """Steps in a row; ``nested`` ones stand in a module of their own, ``again`` ones run twice on the same layer."""

    def __init__(self, steps: list[tuple[str, bool]]) -> None:
        super().__init__()
        self.steps = steps
        self.own = nn.ModuleList(STEPS[name][0]() for name, _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        for (name, again), own in zip(self.steps, self.own, strict=True):
            for _ in range(1 + again):
                x = STEPS[name][1](self, own, x)
        return x


plans = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.booleans()), min_size=1, max_size=3)


def build(outer: list[tuple[str, bool]], inner: list[tuple[str, bool]]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, DIM), Random(outer), Random(inner), nn.Linear(DIM, 3))


@settings(
    max_examples=30, derandomize=True, phases=[Phase.explicit, Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
@example([("counter", True)], [("linear", False)])
@given(plans, plans)
def test_program_of_a_random_model_is_the_model(outer: list[tuple[str, bool]], inner: list[tuple[str, bool]]) -> None:
    model = build(outer, inner)
    program = capture(model, (torch.randn(2, LENGTH, DIM),))
    assert list(program.module.state_dict()) == list(model.state_dict())
    for train in (False, True):
        for batch, length in ((2, LENGTH), (3, 7)):
            x = torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(batch))
            expected = observe(clone(model), (x,), {}, train=train)
            got = observe(program.clone().module, (x,), {}, train=train)
            assert differences(expected, got) == []
