"""Reaching backends by name: what the engine itself does of lowering."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rewrite
from rewrite.graph.program import Program
from tests.captures import capture


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(nn.Linear(4, 4), (torch.randn(2, 4),))


@pytest.fixture
def _two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend `paper` with an option, and one that writes a file called `onnx`; both give back what they got."""

    def paper(program: Program, *, size: str = "a4") -> Any:
        return program, size

    def onnx(program: Program, path: Path, *, opset: int | None = None) -> Path:
        return Path(f"{path}.{opset}")

    rewrite.lower  # noqa: B018  (imports the module)
    monkeypatch.setattr(sys.modules["rewrite.lowering.lower"], "get_backend", {"paper": paper, "onnx": onnx}.__getitem__)


@pytest.mark.usefixtures("_two_backends")
def test_options_are_the_backend_s_own(program: Program) -> None:
    found: Any = rewrite.lower(program, "paper", size="a3")
    assert found == (program, "a3")
    assert rewrite.export_onnx(program, "model", opset=19) == Path("model.19")


@pytest.mark.usefixtures("_two_backends")
def test_a_wrong_option_is_named_with_the_nearest(program: Program) -> None:
    with pytest.raises(rewrite.RewriteError, match=r"'paper': .*'sise'; did you mean 'size'\?; its options: size"):
        rewrite.lower(program, "paper", sise="a3")
    with pytest.raises(rewrite.RewriteError, match=r"backend 'onnx': missing a required argument: 'path'"):
        rewrite.lower(program, "onnx")


def test_an_unknown_backend_is_named_with_the_nearest(program: Program) -> None:
    with pytest.raises(rewrite.RewriteError, match=r"no backend 'inducter'; did you mean 'inductor'\?"):
        rewrite.lower(program, "inducter")


def test_a_module_is_no_program() -> None:
    with pytest.raises(rewrite.RewriteError, match=r"takes a Program, not a Linear: rewrite.capture makes one"):
        rewrite.lower(nn.Linear(2, 2))  # type: ignore[arg-type]
