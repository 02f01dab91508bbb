"""Models drawn at random are the same in each run: how far an approximation is from them depends on the draw."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
