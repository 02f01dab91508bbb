"""A small model in a folder of its own, and a registry that knows the passes of these tests."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import torch

from rewrite import plugins
from rewrite.pipeline import registry
from tests.rewrite.cli.own_passes import Broken, Interrupted, Liar, Picky
from tests.rewrite.cli.running import mlp


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`model.pt`, a small module of torch's own layers, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    torch.save(mlp(), "model.pt")
    return Path("model.pt")


@pytest.fixture
def own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry knows the passes above beside the installed ones."""
    made = [
        EntryPoint(each.name, f"{each.__module__}:{each.__name__}", registry.PASSES)
        for each in (Liar, Picky, Broken, Interrupted)
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*entry_points(group=group), *made])
