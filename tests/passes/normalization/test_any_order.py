"""Any order of the exact passes of this family keeps the function of random small transformers and convolutional nets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewrite import apply
from tests.captures import capture

DIM = 8
EXACT = (
    "rmsnorm",
    "rmsnorm{centering=keep}",
    "layernorm",
    "fold-affine",
    "fold-batchnorm",
    "defer-norm",
    "merge-norms",
    "norm-scaling",
    "layerscale{init=0.5}",
    "rezero{init=2.0}",
    "gpas",
    "deepnorm",
)
orders = st.lists(st.sampled_from(EXACT), min_size=1, max_size=5)


class Branch(nn.Module):
    """One branch with its norm: attention of two heads, or an FFN; pre-norm or post-norm, scaled at its end or not."""

    def __init__(self, attention: bool, norm: Callable[[], nn.Module], post: bool, scaled: bool, bias: bool) -> None:
        super().__init__()
        self.attention, self.post = attention, post
        self.norm = norm()
        self.up, self.down = nn.Linear(DIM, 3 * DIM, bias=bias), nn.Linear(DIM if attention else 3 * DIM, DIM, bias=bias)
        self.scale = nn.Parameter(torch.rand(DIM)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x if self.post else self.norm(x))
        if self.attention:
            q, k, v = y.reshape(*y.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            y = F.gelu(y)
        y = self.down(y)
        x = x + (y if self.scale is None else y * self.scale)
        return self.norm(x) if self.post else x


def away_from_the_start(model: nn.Module) -> nn.Module:
    """In double precision, with parameters and statistics away from 0 and 1."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape))
    return model.double().eval()


def holds(model: nn.Module, x: Tensor, order: list[str]) -> None:
    """Each pass of the order is proven, and the whole gives in evaluation what the model gives."""
    program = apply(capture(model, (x,)), ",".join(order))
    with torch.no_grad():
        expected, found = model(x), program.module.eval()(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-10
    assert [record.text for record in program.history] == order


quick = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@quick
@example(["rmsnorm{centering=keep}", "fold-affine", "layernorm", "rmsnorm", "defer-norm"], "layer", False, True, True)
@example(["layerscale{init=0.5}", "deepnorm", "gpas"], "layer", True, False, True)
@given(orders, st.sampled_from(["layer", "rms"]), st.booleans(), st.booleans(), st.booleans())
def test_transformers(order: list[str], kind: str, post: bool, scaled: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm: Callable[[], nn.Module] = (lambda: nn.LayerNorm(DIM)) if kind == "layer" else (lambda: nn.RMSNorm(DIM, eps=1e-5))
    blocks = [Branch(attention, norm, post, scaled, bias) for attention in (True, False) * 2]
    model = nn.Sequential(nn.Linear(3, DIM), *blocks, norm(), nn.Linear(DIM, 3))
    holds(away_from_the_start(model), torch.randn(2, 5, 3, dtype=torch.float64), order)


class Residual(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(DIM, DIM, 3, padding=1, bias=False),
            nn.Conv2d(DIM, DIM, 1 + 2 * padding, 1, padding),
        )
        self.one, self.two = nn.BatchNorm2d(DIM), nn.BatchNorm2d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.two(F.relu(self.one(self.first(x)))))


@quick
@given(orders, st.lists(st.integers(0, 1), min_size=1, max_size=2))
def test_convolutional_nets(order: list[str], paddings: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, DIM, 1), *(Residual(p) for p in paddings), nn.BatchNorm2d(DIM), nn.ReLU())
    holds(away_from_the_start(model), torch.randn(2, 3, 5, 5, dtype=torch.float64), order)
