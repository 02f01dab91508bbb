"""The names and signatures that users rely on, and the Python of the README."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import Graph

import rewrite
from rewrite.errors import RewriteError

from .examples import run_python

ROOT = Path(__file__).parents[1]
SIGNATURES = {
    "capture": ["model", "args=", "kwargs="],
    "apply": ["model", "passes", "args=", "kwargs=", "*", "seed=", "verify=", "share=", "data="],
    "transform": ["model", "passes", "args=", "kwargs=", "*", "seed=", "verify=", "data="],
    "verify": ["a", "b", "args=", "kwargs=", "*", "seed="],
    "save": ["program", "path"],
    "load": ["path"],
    "graft": ["program", "model", "*", "verify="],
    "lower": ["program", "backend=", "**options"],
    "export_onnx": ["program", "path", "**options"],
    "prove": ["before", "after", "*", "contract=", "seed="],
    "depth": ["program", "data", "*", "dependency=", "progress=", "seed="],
    "heal": ["new", "teacher", "data", "*", "steps=", "loss=", "seed=", "checkpoint="],
    "expand_state": ["optimizer_state", "old", "new"],
    "memory": ["model", "args=", "kwargs=", "*", "backend=", "seed="],
    "get_pass": ["name"],
    "pass_names": [],
}


def spelled(function: Callable[..., object]) -> list[str]:
    """The parameters in order: `*` before the keyword-only ones, `=` behind those with a default."""
    words: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        words.append(stars + parameter.name + "=" * (parameter.default is not parameter.empty))
    return words


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def program(model: nn.Module, x: torch.Tensor) -> rewrite.Program:
    return rewrite.capture(model, args=(x,), kwargs=None)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_only_grow(name: str) -> None:
    wanted, found = SIGNATURES[name], spelled(getattr(rewrite, name))
    positional = wanted.index("*") if "*" in wanted else len(wanted)
    assert found[:positional] == wanted[:positional]
    assert set(wanted) <= set(found)
    added = [word for word in found if word not in wanted]
    assert all(word.endswith("=") or word.startswith("*") for word in added), f"{added} would break callers"


def test_functions_and_classes_are_all() -> None:
    promises = {"SAME", "CLOSE", "NEW", "ESTIMATE"}
    classes = {"Contract", "Pass", "Program", "RewriteError", "Selector", "VerificationError"}
    assert set(rewrite.__all__) == {*SIGNATURES, *classes, *promises, "option"}
    assert issubclass(rewrite.RewriteError, Exception)
    assert RewriteError is rewrite.RewriteError


def test_a_program_has_module_graph_opaque_and_history(program: rewrite.Program, model: nn.Module, x: torch.Tensor) -> None:
    assert isinstance(program.module, nn.Module)
    assert isinstance(program.graph, Graph)
    assert program.graph is program.module.graph
    assert program.opaque == ()
    assert program.history == ()
    assert list(program.module.state_dict()) == list(model.state_dict())
    assert torch.equal(program.clone().module.eval()(x), model.eval()(x))


def test_capture_takes_keywords(model: nn.Module, x: torch.Tensor) -> None:
    program = rewrite.capture(model, kwargs={"input": x})
    assert torch.equal(program.module.eval()(input=x), model.eval()(x))


def test_apply_takes_a_program_and_a_text(program: rewrite.Program) -> None:
    result = rewrite.apply(program, "dyt{alpha=0.8},dyt")
    assert [record.text for record in result.history] == ["dyt{alpha=0.8}", "dyt"]
    assert [record.changed for record in result.history] == [True, False]
    assert program.history == ()


def test_apply_takes_a_model_and_a_list_of_passes(model: nn.Module, x: torch.Tensor) -> None:
    dyt = rewrite.get_pass("dyt")
    result = rewrite.apply(model, [dyt(alpha=0.8), "dyt"], args=(x,))
    assert [record.text for record in result.history] == ["dyt{alpha=0.8}", "dyt"]


def test_verify_takes_programs_and_modules(program: rewrite.Program, model: nn.Module, x: torch.Tensor) -> None:
    assert rewrite.verify(program, model).bitwise
    assert rewrite.verify(model, program, args=(x,), kwargs={}).same
    assert not rewrite.verify(program, rewrite.apply(program, "dyt"))


def test_save_and_load(program: rewrite.Program, tmp_path: Path) -> None:
    result = rewrite.apply(program, "dyt")
    path = rewrite.save(result, tmp_path / "model.pt2")
    loaded = rewrite.load(str(path))
    assert rewrite.verify(result, loaded).bitwise
    assert loaded.history == result.history


def test_graft_gives_the_class_back(program: rewrite.Program, model: nn.Module, x: torch.Tensor) -> None:
    result = rewrite.apply(program, "dyt")
    grafted = rewrite.graft(result, model)
    assert type(grafted) is type(model)
    assert rewrite.verify(result, grafted, (x,)).same


@pytest.mark.parametrize("backend", ["eager", "inductor", "onnxruntime"])
def test_lower(program: rewrite.Program, model: nn.Module, x: torch.Tensor, backend: str) -> None:
    run = rewrite.lower(program, backend)
    torch.testing.assert_close(run(x), model.eval()(x))


def test_export_onnx(program: rewrite.Program, tmp_path: Path) -> None:
    path = rewrite.export_onnx(program, tmp_path / "model.onnx")
    assert path == tmp_path / "model.onnx"
    assert path.stat().st_size


def test_passes_are_found_by_name() -> None:
    assert "dyt" in rewrite.pass_names()
    assert issubclass(rewrite.get_pass("dyt"), rewrite.Pass)
    assert isinstance(rewrite.get_pass("dyt")().contract(), rewrite.Contract)


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(ROOT / "README.md")
    assert {path.name for path in tmp_path.iterdir()} == {"vit.dyt.pt2", "vit.dyt.onnx"}
