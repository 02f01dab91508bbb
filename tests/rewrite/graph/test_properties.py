"""Properties of a program: set by a pass, proven, copied, saved, grafted, captured again, and gone for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import rewrite
from rewrite import ESTIMATE, SAME, Contract, Pass, Program, RewriteError, VerificationError, option, plugins
from rewrite.graph.edit import Editor
from rewrite.graph.hooks import hung
from rewrite.graph.properties import Property, frozen, thawed
from rewrite.pipeline.context import Context
from rewrite.sources.pickles import load_module
from tests.captures import capture

X = torch.randn(4, 8)


def narrow(module: nn.Module, inputs: Sequence[Tensor], value: Any) -> saved_tensors_hooks:
    """Keeps what autograd saves, parameters and the input left aside, in bfloat16; as it is where value is "whole"."""
    own = {p.data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        keep = value == "whole" or tensor.data_ptr() in own or not tensor.is_floating_point()
        return tensor if keep else tensor.bfloat16()

    return saved_tensors_hooks(pack, lambda tensor: tensor.to(next(module.parameters()).dtype))


def no_number(value: Any) -> None:
    if isinstance(value, int):
        raise RewriteError("saved_tensors takes a word")


@contextmanager
def rounded(module: nn.Module, inputs: Sequence[Tensor], value: Any) -> Iterator[None]:
    weight = next(module.parameters())
    kept, weight.data = weight.data, weight.data * 1.01
    yield
    weight.data = kept


ANNOUNCED = {
    "saved_tensors": Property(narrow, no_number),
    "rounded": Property(rounded),
    "masks": Property(inference=True),
}


class Point:
    """An entry point of the group."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Property:
        return ANNOUNCED[self.name]


def announce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the properties above be installed."""
    real = plugins.entry_points
    points = [Point(name) for name in ANNOUNCED]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.PROPERTIES else real(group=group))


@pytest.fixture(autouse=True)
def _announced(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch)


@dataclass(frozen=True)
class SetProperty(Pass):
    """Set a property of the program."""

    name = "set-property"
    what: str = option("saved_tensors", "the property")
    value: str = option("narrow", "its value")
    estimate: bool = option(True, "whether the gradient is an estimate")

    def contract(self) -> Contract:
        return Contract(SAME, ESTIMATE if self.estimate else SAME)

    def run(self, program: Program, context: Context) -> None:
        context.edit.set_property(self.what, self.value)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 4))


@pytest.fixture
def program() -> Program:
    return rewrite.apply(net(), [SetProperty()], args=(X,))


def gradients(module: nn.Module) -> list[Tensor]:
    module.train()
    torch.manual_seed(1)
    return list(torch.autograd.grad(module(X).square().sum(), list(module.parameters())))


def test_it_is_journaled_and_proven(program: Program) -> None:
    (record,) = program.history
    assert [(site.path, site.kind, site.detail) for site in record.changes] == [
        ("saved_tensors", "set property", "saved_tensors: None -> narrow")
    ]
    assert record.verification is not None
    checks = {check.name: check for check in record.verification.checks}
    assert checks["properties, train"].passed
    assert "gradient" not in checks
    assert 0 < (checks["properties' gradient, train"].error or 0) < 0.02
    again = rewrite.apply(program, [SetProperty()])
    assert not again.history[-1].changed


def test_every_form_runs_under_it(program: Program, tmp_path: Path) -> None:
    model = net()
    exact, wanted = gradients(copy.deepcopy(model)), gradients(program.module)
    assert not all(map(torch.equal, exact, wanted))
    grafted = rewrite.graft(program, model)
    torch.save(grafted, tmp_path / "net.pt")
    forms = {
        "cloned": program.clone().module,
        "copied": copy.deepcopy(program.module),
        "loaded": rewrite.load(rewrite.save(program, tmp_path / "net.pt2")).module,
        "grafted": grafted,
        "grafted copy": copy.deepcopy(grafted),
        "pickled": torch.load(tmp_path / "net.pt", weights_only=False),
        "read without trust": load_module(tmp_path / "net.pt"),
        "captured again": capture(grafted, (X,)).module,
        "grafted again": rewrite.graft(capture(grafted, (X,)), grafted),
    }
    for name, module in forms.items():
        assert all(map(torch.equal, wanted, gradients(module))), name
    assert all(map(torch.equal, exact, gradients(model)))
    assert type(grafted) is nn.Sequential


def test_for_inference_what_is_for_training_is_gone(program: Program) -> None:
    Editor(program, "test").set_property("masks", {"layers": ["0", "3"], "share": 0.5})
    lowered: Any = rewrite.lower(program)
    assert thawed(lowered.module.properties) == {"masks": {"layers": ["0", "3"], "share": 0.5}}
    assert thawed(program.properties)["saved_tensors"] == "narrow"


def test_the_grafted_model_leaves_the_context_where_its_forward_raises(program: Program) -> None:
    grafted = rewrite.graft(program, net())
    with pytest.raises(RuntimeError):
        grafted(torch.randn(4, 9))
    x = torch.randn(3, requires_grad=True)
    y = x.exp()
    assert y.grad_fn is not None
    assert y.grad_fn._saved_result.dtype is torch.float32  # type: ignore[attr-defined]
    assert all(map(torch.equal, gradients(program.module), gradients(grafted)))


def test_what_changes_an_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="properties, eval: outputs and buffers bit for bit: they are not"):
        rewrite.apply(net(), [SetProperty("rounded")], args=(X,), crash_folder=tmp_path)


def test_a_gradient_that_is_promised_to_be_the_same_is_held_to_it(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="properties' gradient, eval"):
        rewrite.apply(net(), [SetProperty(estimate=False)], args=(X,), crash_folder=tmp_path)
    whole = rewrite.apply(net(), [SetProperty(value="whole", estimate=False)], args=(X,))
    assert whole.properties["saved_tensors"] == "whole"


def test_a_change_past_the_editor_is_found(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Sly(SetProperty):
        def run(self, program: Program, context: Context) -> None:
            program.module.assume({"saved_tensors": "narrow"})

    with pytest.raises(VerificationError, match="saved_tensors: the property changed, and no edit accounts for it"):
        rewrite.apply(net(), [Sly()], args=(X,), crash_folder=tmp_path)


def test_values_are_plain_known_and_frozen(program: Program) -> None:
    edit = Editor(program, "test")
    with pytest.raises(RewriteError, match="no property 'saved_tensor' of programs; did you mean 'saved_tensors'"):
        edit.set_property("saved_tensor", "narrow")
    with pytest.raises(RewriteError, match="takes a word"):
        edit.set_property("saved_tensors", 3)
    with pytest.raises(RewriteError, match="no plain JSON value"):
        edit.set_property("masks", {"mask": torch.ones(2)})
    with pytest.raises(RewriteError, match="no plain JSON value"):
        edit.set_property("masks", float("nan"))
    with pytest.raises(RewriteError, match="nested deeper"):
        edit.set_property("masks", eval("[" * 20 + "]" * 20))
    with pytest.raises(TypeError):
        program.properties["saved_tensors"] = "other"  # type: ignore[index]
    value = frozen({"a": [1, {"b": None}]})
    assert value["a"] == (1, {"b": None})
    assert thawed(value) == {"a": [1, {"b": None}]}
    edit.set_property("saved_tensors", None)
    assert not program.properties


def test_a_file_with_a_property_that_is_not_installed_is_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rewrite.save(program, tmp_path / "net.pt2")
    monkeypatch.delitem(ANNOUNCED, "saved_tensors")
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    with pytest.raises(RewriteError, match="the package that it comes from is not installed"):
        rewrite.load(file)
    torch.export.load(file)


def test_a_model_that_is_grafted_again_is_compared_without_its_properties(program: Program) -> None:
    model = net()
    once = rewrite.graft(program, model)
    again = rewrite.graft(capture(model, (X,)), once)
    assert all(map(torch.equal, gradients(again), gradients(model)))
    assert not hung(again)
