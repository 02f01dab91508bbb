"""random-prune: the models the kit tries it on, exact counts, ratios by hand, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewrite import apply
from rewrite.analysis.densities import densities
from rewrite.pipeline.masking import Masked
from tests.passes.table import Row

ROWS = [
    Row("random-prune{sparsity=0.5}", "EncoderLayer", 3, compiled=True),
    Row("random-prune{sparsity=0.5 ratios=uniform}", "resnet18", 15),
    Row("random-prune{sparsity=0.5}", "gpt2", 8),
    Row("random-prune", "LayerNormNearMisses", 0),
]


def masks(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.mask for name, layer in module.named_modules() if isinstance(layer, Masked)}


def test_counts_are_exact_and_drawn_from_the_seed() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
    x = torch.randn(3, 10)
    first, again, other = (
        masks(apply(model, f"random-prune{{sparsity=0.7 ratios=uniform seed={seed}}}", args=(x,)).module)
        for seed in (0, 0, 1)
    )
    assert [int(m.sum()) for m in first.values()] == [60, 30]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["0"], other["0"])
    assert not torch.equal(first["0"].flatten()[:100], first["1"].flatten()[:100])


def test_masked_weights_get_no_gradient_and_keep_their_names() -> None:
    model = nn.Sequential(nn.Linear(10, 20))
    module = apply(model, "random-prune{sparsity=0.5}", args=(torch.randn(3, 10),)).module
    module(torch.randn(4, 10)).sum().backward()
    (mask,) = masks(module).values()
    grad = module.get_parameter("0.weight").grad
    assert grad is not None
    assert not grad[~mask].any()
    assert list(module.state_dict()) == ["0.weight", "0.bias", "0.mask"]


@pytest.mark.parametrize("ratios", ["uniform", "er", "erk"])
def test_densities_add_up(ratios: str) -> None:
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)]
    found = densities(shapes, 0.1, ratios)  # type: ignore[arg-type]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(0.1 * sum(sizes))
    assert all(0 <= d <= 1 for d in found)


def test_erdos_renyi_by_hand() -> None:
    """raw = (4 + 6)/24 and (10 + 10)/100; eps = 0.25 * 124 / (10 + 20)."""
    eps = 0.25 * 124 / 30
    assert densities([(4, 6), (10, 10)], 0.25, "er") == pytest.approx([eps * 10 / 24, eps * 20 / 100])


def test_a_layer_whose_density_exceeds_one_is_dense() -> None:
    first, second = densities([(2, 2), (100, 100)], 0.1, "erk")
    assert first == 1.0
    assert second == pytest.approx((0.1 * 10004 - 4) / 10000)


def test_tied_weights_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embed(ids)))

    result = apply(Tied(), "random-prune{sparsity=0.5}", args=(torch.randint(0, 7, (2, 3)),))
    assert [s.path for s in result.history[0].skipped] == ["head"]
    assert list(masks(result.module)) == ["body"]
