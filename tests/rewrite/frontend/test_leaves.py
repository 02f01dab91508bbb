"""Layers that passes put in are captured as they are, wherever a graph can hold them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import rewrite
from rewrite import Program

DIM = 8
X = torch.randn(3, DIM)


class Net(nn.Module):
    """A norm that is called twice, one that hangs under two names, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.other = self.again = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        return self.other(self.second(self.norm(x) + 1)) + self.again(x)


def kinds(program: Program) -> dict[str, str]:
    return {str(node.target): type(layer).__name__ for node, layer in program.layers()}


@pytest.fixture(scope="module")
def grafted() -> nn.Module:
    return rewrite.transform(Net(), "dyt,random-prune{sparsity=0.5}", args=(X,))


def test_a_grafted_model_is_seen_with_the_layers_of_its_passes(grafted: nn.Module) -> None:
    program = rewrite.capture(grafted, (X,))
    norms = dict.fromkeys(("norm", "other"), "DynamicTanh")
    assert kinds(program) == {**norms, "first": "MaskedLinear", "second": "MaskedLinear"}
    assert list(program.module.state_dict()) == list(grafted.state_dict())
    assert all(program.module.get_parameter(name) is p for name, p in grafted.named_parameters())
    assert program.opaque == ()
    assert rewrite.verify(grafted, program).bitwise


def test_a_second_pass_over_it_is_proven(grafted: nn.Module) -> None:
    model = nn.Sequential(nn.RMSNorm(DIM), *grafted.children())[:3]
    program = rewrite.apply(model, "dyt,fold-affine", args=(X,))
    assert [record.verification.passed for record in program.history if record.verification] == [True, True]
    assert [[site.path for site in record.changes] for record in program.history] == [["0"], []]
    assert kinds(program) == {"0": "DynamicTanh", "1": "DynamicTanh", "2": "MaskedLinear"}


def test_it_can_be_cast_saved_and_pickled(grafted: nn.Module, tmp_path: Path) -> None:
    torch.save(grafted, tmp_path / "net.pt")
    program = rewrite.capture(torch.load(tmp_path / "net.pt", weights_only=False), (X,))
    again = rewrite.load(rewrite.save(program, tmp_path / "net.pt2"))
    assert kinds(again) == kinds(program)
    cast = copy.deepcopy(grafted).bfloat16()
    assert torch.equal(cast(X.bfloat16()), again.module.bfloat16()(X.bfloat16()))


class Gate(nn.Module):
    """A layer with children, random numbers, a keyword, and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(0.5)
        self.calls: list[int] = []

    def forward(self, x: Tensor, scale: float = 1.0, *, gate: Tensor) -> tuple[Tensor, Tensor]:
        y = self.drop(self.inner(x)) * scale
        return y * torch.sigmoid(gate), y


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.gate(x, 2.0, gate=x + 1)
        return (y - z).relu()


def test_a_leaf_may_hold_layers_take_keywords_and_give_several_results() -> None:
    model = Gated()
    program = rewrite.capture(model, (X,), leaves=[Gate])
    assert kinds(program)["gate"] == "Gate"
    assert list(program.module.state_dict()) == list(model.state_dict())
    assert rewrite.verify(model, program).bitwise
    assert kinds(rewrite.capture(model, (X,))) == {
        "gate.inner": "Linear",
        "gate.drop": "Dropout",
        "gate.sigmoid": "Sigmoid",
        "relu": "ReLU",
    }


class Twice(nn.Module):
    """y = 2 x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * torch.eye(DIM, dtype=x.dtype))


class Around(nn.Module):
    """Calls the layer where a graph keeps a region: under autocast, without gradient, in one mode only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.leaf, self.free, self.kind = Twice(), Twice(), kind
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(x) * self.scale
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return self.leaf(x).float()
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.leaf(x)
        return self.leaf(x) if self.training else x + 1


@pytest.mark.parametrize("kind", ["autocast", "no_grad", "mode"])
def test_in_a_region_a_leaf_is_what_it_computes(kind: str) -> None:
    model = Around(kind)
    program = rewrite.capture(model, (X,), leaves=[Twice])
    assert kinds(program)["free"] == "Twice"
    assert "leaf" not in kinds(program) or kinds(program)["leaf"] == "Region"
    assert rewrite.verify(model, program).bitwise


def test_what_hooks_do_is_in_the_graph() -> None:
    model = nn.Sequential(Twice(), Twice(), nn.Linear(DIM, DIM))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda module, args, output: output * 3)
    program = rewrite.capture(model, (X,), leaves=[Twice])
    assert kinds(program) == {"1": "Twice", "2": "Linear"}
    assert rewrite.verify(model, program).bitwise


def test_a_subclass_is_no_layer_of_a_pass() -> None:
    class Thrice(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    assert kinds(rewrite.capture(nn.Sequential(Thrice()), (X,), leaves=[Twice])) == {}


def test_results_that_are_no_tensors_are_refused_by_path() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"y": x + 1}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named = Named()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.named(x)["y"]
            return found

    with pytest.raises(rewrite.RewriteError, match="named returns something else than tensors"):
        rewrite.capture(Model(), (X,), leaves=[Named])
