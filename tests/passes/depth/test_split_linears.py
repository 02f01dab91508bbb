"""split-linears: the models the kit tries it on, the way back to names and bytes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewrite import apply, graft, load, save
from rewrite.graph.edit import Editor
from rewrite.graph.program import Program
from tests.captures import shared
from tests.compare import model_of
from tests.passes.table import Row

from .test_merge_linears import Attention, Block, X

ROWS = [
    Row("split-linears", "llama", 48, after="merge-linears"),
    Row("split-linears", "bert", 34, after="merge-linears"),
    Row("split-linears", "gpt2", 0),
]


def same_state(a: Program, b: Program) -> bool:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_the_old_layers_names_order_and_bytes_come_back_from_a_file_too(name: str, tmp_path: Path) -> None:
    program = shared(name)
    merged = apply(program, "merge-linears", verify=False)
    assert not same_state(merged, program)
    back = apply(load(save(merged, tmp_path / "merged.pt2")), "split-linears", verify=False)
    assert same_state(back, program)
    kinds = [{str(node.target): type(layer) for node, layer in p.layers()} for p in (program, back)]
    assert kinds[0] == kinds[1]


class Pairs(nn.Module):
    """Two values, two layers each: two groups in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.b(x)
        return self.e(self.c(y) * self.d(y))


@pytest.mark.parametrize("model", [nn.Sequential(Block(), Block()), Pairs()], ids=["blocks", "pairs"])
def test_layers_of_several_groups_go_back_where_they_were(model: nn.Module) -> None:
    program = apply(model, [], args=(X,))
    assert same_state(apply(program, "merge-linears,split-linears"), program)


def test_the_users_class_takes_the_layers_that_are_back() -> None:
    """A key's bias has a gradient that is rounding alone, and another rounding after the split."""
    back = apply(shared("bert"), "merge-linears,split-linears", verify=False)
    model = model_of("bert")
    made = graft(back, model)
    assert type(made) is type(model)
    assert [*made.state_dict()] == [*model.state_dict()]


def test_what_came_between_stays_with_its_rows() -> None:
    model = Attention()
    program = apply(model, "merge-linears,fold-affine,split-linears", args=(X,))
    again = apply(model, "fold-affine", args=(X,))
    assert [r.changed for r in program.history] == [True] * 3
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (p.module.get_submodule(name) for p in (program, again))
        assert torch.equal(ours.weight, theirs.weight)  # type: ignore[arg-type]


def test_a_frozen_layer_stays_frozen() -> None:
    model = Attention()
    model.requires_grad_(False)
    program = apply(model, "merge-linears,split-linears", args=(X,))
    assert not any(p.requires_grad for p in program.module.parameters())


def test_an_output_that_is_read_whole_and_a_name_that_is_taken_are_left_alone() -> None:
    merged = apply(Attention(), "merge-linears", args=(X,))
    whole = merged.clone()
    edit = Editor(whole, "test")
    node = next(n for n in whole.graph.nodes if n.target == "qkv_proj")
    made = edit.insert_function(torch.ops.aten.mul.Tensor, (node, node), after=node)
    edit.rewire(node, made, lambda user: "split" in user.name)
    whole.module.recompile()
    (skip,) = apply(whole, "split-linears").history[-1].skipped
    assert (skip.path, skip.reason) == ("qkv_proj", f"{made.name} reads it whole")
    taken = merged.clone()
    taken.module.add_module("k_proj", nn.Identity())
    (skip,) = apply(taken, "split-linears", verify=False).history[-1].skipped
    assert skip.reason == "there is a module at k_proj already"


def test_gradients_of_the_old_layers_are_the_rows_of_the_merged_ones() -> None:
    model = Attention()
    module = apply(model, "merge-linears", args=(X,)).module
    x: Tensor = torch.randn(3, 4, 8)
    module(x).square().sum().backward()
    model(x).square().sum().backward()
    found = module.get_parameter("qkv_proj.weight").grad
    assert found is not None
    rows = [getattr(model, name).weight.grad for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.allclose(found, torch.cat(rows), atol=1e-5)
