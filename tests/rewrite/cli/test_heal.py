"""`rewrite heal` and `rewrite apply --heal`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.rewrite.cli.running import run
from tests.rewrite.cli.test_depth import saved


def with_samples(folder: Path) -> tuple[Path, Path]:
    """A model, and data enough to learn from."""
    torch.manual_seed(0)
    model, data = saved(folder)
    torch.save([torch.randn(32, 8) for _ in range(20)], data)
    return model, data


def test_apply_heals_what_its_passes_cost(tmp_path: Path) -> None:
    model, data = with_samples(tmp_path)
    report = tmp_path / "report.json"
    arguments = ("apply", model, "-p", "dyt", "--inputs", "2x8", "--trust-pickle", "--report", report)
    text = run(*arguments, "--heal", data, "--heal-steps", "10").stdout
    assert "heal{steps=10 loss=mse lr=0.0005}" in text
    assert "model.dyt.heal.pt" in text
    assert (tmp_path / "model.dyt.heal.pt").exists()
    told = json.loads(report.read_text())
    assert [record["name"] for record in told["passes"]] == ["dyt", "heal"]
    figures = told["passes"][1]["measured"][0]["figures"]
    assert figures["after"] < figures["before"]


def test_heal_takes_a_program_and_its_original_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    model, data = with_samples(tmp_path)
    common = ("--inputs", "2x8", "--trust-pickle")
    new, file = tmp_path / "short.pt2", tmp_path / "standing.pt"
    run("apply", model, "-p", "drop-ffn{layers=1}", *common, "-o", new)
    arguments = ("heal", new, "--teacher", model, "--data", data, "--steps", "5", "--checkpoint", file, *common)
    assert "wrote" in run(*arguments).stdout
    assert (tmp_path / "short.heal.pt2").exists()
    assert not file.exists()
    torch.save([torch.randn(3, 2)], data)
    assert "does not fit the model" in run(*arguments, code=2).stderr
