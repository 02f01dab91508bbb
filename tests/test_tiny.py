"""The whole way on one small model, in seconds: what to run before each commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite.passes.normalization.dyt import DynamicTanh
from rewrite.testing.observe import differences, observe


class Block(nn.Module):
    """A pre-norm block with dropout, so that training differs from evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.mix = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Block()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program(model: nn.Module, x: Tensor) -> rewrite.Program:
    return rewrite.capture(model, (x,))


@pytest.fixture(scope="module")
def result(program: rewrite.Program) -> rewrite.Program:
    return rewrite.apply(program, "dyt{alpha=0.8}")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_the_program_is_the_model_bit_for_bit(model: nn.Module, program: rewrite.Program, x: Tensor, train: bool) -> None:
    expected = observe(model, (x,), {}, train=train)
    assert differences(expected, observe(program.clone().module, (x,), {}, train=train)) == []


def test_the_pass_changes_what_it_says_and_proves_it(result: rewrite.Program) -> None:
    (record,) = result.history
    assert [site.path for site in record.changes] == ["norm1", "norm2"]
    assert record.verification is not None
    assert record.verification.passed


def test_the_users_class_comes_back(result: rewrite.Program, model: nn.Module, x: Tensor) -> None:
    made = rewrite.graft(result, model)
    assert type(made) is Block
    assert isinstance(made.norm1, DynamicTanh)
    assert rewrite.verify(result, made, (x,)).same


def test_a_file_holds_it(result: rewrite.Program, tmp_path: Path) -> None:
    again = rewrite.load(rewrite.save(result, tmp_path / "model.pt2"))
    assert again.history == result.history
    assert rewrite.verify(result, again).bitwise


def test_onnx_runtime_runs_it(result: rewrite.Program, x: Tensor) -> None:
    torch.testing.assert_close(rewrite.lower(result, "onnxruntime")(x), rewrite.lower(result)(x))


def test_the_command_line_applies_it(program: rewrite.Program, tmp_path: Path) -> None:
    rewrite.save(program, tmp_path / "model.pt2")
    command = [sys.executable, "-m", "rewrite", "apply", "model.pt2", "--pass", "dyt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [site.path for site in rewrite.load(tmp_path / "model.dyt.pt2").history[0].changes] == ["norm1", "norm2"]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rewrite", "apply", "missing.pt", "--pass", "dyt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "missing.pt" in done.stderr
    assert "Traceback" not in done.stderr
