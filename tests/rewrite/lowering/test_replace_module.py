"""Whole modules of the user's replaced by a layer: in the graph, in the journal, proven, and in their class again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import NEW, Contract, Pass, Program, RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.module_calls import module_calls
from rewrite.pipeline.context import Context
from rewrite.pipeline.pass_ import option
from tests.captures import capture

X = torch.randn(2, 5, 8)


class Attention(nn.Module):
    """One head; it returns a tuple, and takes a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Tensor, None]:
        scores = self.q(x) @ self.k(x).mT * scale * self.temperature
        scores = scores if mask is None else scores + mask
        return torch.softmax(scores, -1) @ self.v(x), None


class Block(nn.Module):
    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        self.form = form
        self.norm, self.attn, self.fc = nn.LayerNorm(8), Attention(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        match self.form:
            case "tuple":
                found = self.attn(n)[0]
            case "keywords":
                found = self.attn(scale=0.5, x=n, mask=None)[0]
            case "ambiguous":
                found = self.attn(n, mask=(x @ x.mT).detach())[0]
            case "beside":
                found = self.attn(n)[0] + self.attn.v(x)
            case _:
                found = self.attn(n)[0]
        return x + self.fc(found)


class Neighbors(nn.Module):
    """y_t = g · (x_t + x_(t-1)), with a trained gain: mixing without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.roll(1, -2)) * self.gain


@dataclass(frozen=True)
class Mix(Pass):
    """Mix neighbors in place of a module: y_t = g (x_t + x_(t-1))."""

    name = "mix"
    path: str = option("attn", "the module to replace")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        context.edit.replace_module(self.path, Neighbors())

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        shifted = torch.cat([x[..., -1:, :], x[..., :-1, :]], -2)
        return torch.einsum("...tc,c->...tc", x + shifted, new.gain)


@pytest.mark.parametrize("form", ["tuple", "keywords"])
def test_a_whole_module_is_replaced_proven_and_given_back(form: str, tmp_path: Path) -> None:
    model = Block(form)
    program = rewrite.apply(model, [Mix()], args=(X,))
    (record,) = program.history
    assert record.verification is not None
    assert record.verification.passed
    assert [n.target for n, _ in program.layers()] == ["norm", "attn", "fc"]
    assert [name for name in program.module.state_dict() if "attn" in name] == ["attn.gain"]
    for one in (program, copy.deepcopy(program)):
        made = rewrite.graft(one, model)
        assert type(made) is Block
        assert torch.equal(made.eval()(X), program.module.eval()(X))
        made.train()(X).sum().backward()
    torch.save(made, tmp_path / "made.pt")
    assert torch.equal(torch.load(tmp_path / "made.pt", weights_only=False).eval()(X), program.module.eval()(X))


def test_a_module_of_one_tensor_in_and_out_takes_the_layer_as_it_is() -> None:
    class Plain(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm(x))  # type: ignore[no-any-return, operator]

    made = rewrite.graft(rewrite.apply(Plain(), [Mix()], args=(X,)), Plain())
    assert type(made.attn) is Neighbors


def test_every_call_of_a_module_is_replaced() -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)[0] + self.attn(x + 1)[0]

    program = rewrite.apply(Twice(), [Mix()], args=(X,))
    assert len(module_calls(program.graph, "attn")) == 2
    assert torch.equal(rewrite.graft(program, Twice()).eval()(X), program.module.eval()(X))


def refusal(model: nn.Module, path: str = "attn", layer: nn.Module | None = None) -> str:
    program = capture(model, (X,)).clone()
    before = program.module.code
    with pytest.raises(RewriteError) as info:
        Editor(program, "test").replace_module(path, layer or Neighbors())
    program.module.recompile()
    assert program.module.code == before
    return str(info.value)


@pytest.mark.parametrize(
    ("model", "path", "layer", "words"),
    [
        (Block("ambiguous"), "attn", None, "the module at attn is given 2 tensors"),
        (Block("beside"), "attn", None, "attn.v, which is part of the module at attn, is used outside of it too"),
        (Block(), "nothing", None, "there is no call of a module at nothing"),
        (Block(), "attn", nn.Linear(8, 4), "the new layer at attn gives"),
    ],
)
def test_what_cannot_be_replaced_is_refused_before_anything_changes(
    model: nn.Module, path: str, layer: nn.Module | None, words: str
) -> None:
    assert words in refusal(model, path, layer)


def test_a_class_that_hands_over_two_tensors_alike_is_refused_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = Added(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x, x * 2))

    class Added(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(x)

    program = rewrite.apply(Two(), [Mix(path="inner")], args=(X,), verify=False)
    with pytest.raises(RewriteError, match="the module at inner is called with 2 tensors like the one"):
        rewrite.graft(program, Two())


def test_the_journal_says_what_the_module_was() -> None:
    sites: Sequence[Any] = rewrite.apply(Block(), [Mix()], args=(X,), verify=False).history[0].changes
    (site,) = [s for s in sites if s.kind == "replace module"]
    assert (site.path, site.detail) == ("attn", "Attention -> Neighbors")
