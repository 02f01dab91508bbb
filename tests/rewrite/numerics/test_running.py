"""Running statistics: equal to those of all values together, however the stream is cut."""

from __future__ import annotations

import pytest
import torch

from rewrite.numerics.running import Moments, Quantiles

X = torch.randn(400, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 1e-3, 1, 5]) + 7


@pytest.mark.parametrize("axis", [None, -1, 1])
@pytest.mark.parametrize("pieces", [1, 7, 400])
def test_moments_are_those_of_all_values(axis: int | None, pieces: int) -> None:
    found = Moments(axis)
    for piece in X.chunk(pieces):
        found.update(piece)
    wide = X.double()
    rows = wide.reshape(-1) if axis is None else wide.movedim(axis, -1).reshape(-1, X.shape[axis])
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.variance, rows.var(0, correction=0))
    torch.testing.assert_close(found.absolute, rows.abs().mean(0))
    torch.testing.assert_close(found.rms, rows.square().mean(0).sqrt())
    assert torch.equal(found.smallest.double(), rows.amin(0))
    assert torch.equal(found.largest.double(), rows.amax(0))
    assert found.count == len(rows)


def test_variance_survives_a_large_mean() -> None:
    found = Moments()
    for piece in (1e8 + torch.randn(1000, dtype=torch.float64)).chunk(10):
        found.update(piece)
    assert found.variance == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_quantiles_to_one_percent(axis: int | None, share: float) -> None:
    found = Quantiles(axis)
    x = X - 7
    for piece in x.chunk(9):
        found.update(piece)
    rows = x.double().reshape(-1) if axis is None else x.double().reshape(-1, 5)
    expected = rows.quantile(share, dim=0, interpolation="lower")
    torch.testing.assert_close(found.at(share), expected, rtol=0.021, atol=1e-12)


def test_quantiles_of_zeros_extremes_and_nothing() -> None:
    found = Quantiles()
    assert found.at(0.5).isnan()
    found.update(torch.tensor([0.0, 0.0, 0.0, 1e30, float("nan"), float("inf")]))
    assert found.at(0.5) == 0
    assert found.at(1.0) == pytest.approx(1e12, rel=0.03)


def test_memory_is_fixed() -> None:
    found = Quantiles(-1)
    found.update(X)
    before = found.counts.numel()
    for _ in range(5):
        found.update(X)
    assert found.counts.numel() == before
