"""Values that move on purpose, tensors untied, branches taken out: what is wrong with them is stopped, right ones pass."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import CLOSE, NEW, Contract, Pass, Program, VerificationError, apply
from rewrite.analysis.norms import norms
from rewrite.analysis.streams import stream_of
from rewrite.graph.relation import Centered, Relation, Scaled
from rewrite.pipeline.context import Context
from tests.captures import capture

from .models import Block
from .steps import Action, step

DIM = 8


class Model(nn.Module):
    """Words and positions into a stream of two blocks, its final norm read by a head that shares the words' weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, DIM), nn.Embedding(6, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


@functools.cache
def program() -> Program:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return capture(model, (torch.randint(12, (2, 6)),))


WRITERS = {
    "words.weight": 1,
    "places.weight": 1,
    "blocks.0.second.weight": 0,
    "blocks.0.second.bias": 0,
    "blocks.1.second.weight": 0,
    "blocks.1.second.bias": 0,
}


def centering(
    *,
    forgotten: str = "",
    factor: float = 1.0,
    axis: int | None = None,
    tied: bool = False,
    moved: bool = True,
    relation: Relation | None = None,
    eps: float = 1e-5,
    head: float = 1.0,
    mapped: bool = True,
) -> Action:
    """LayerNorm to RMSNorm by centering all writers, with one thing done wrong."""

    def action(program: Program, context: Context) -> None:
        edit, found = context.edit, norms(program)
        if moved:
            edit.move(list(stream_of(program, found[0].node.all_input_nodes[0], -1).values), "centered", relation)
        if not tied:
            edit.untie("words.weight")
        if head != 1.0:
            edit.set_parameter("head.weight", lambda w: w * head, "head.weight")
        for path, own in WRITERS.items():
            if path != forgotten:
                along = own if axis is None or program.module.get_parameter(path).dim() == 1 else axis
                compute = functools.partial(_centered, axis=along, factor=factor)
                value = program.module.get_parameter(path)
                edit.set_parameter(path, *((compute, path) if mapped else (compute(value),)))
        for norm in found:
            made = nn.RMSNorm(norm.shape, eps, elementwise_affine=False)
            edit.replace_layer(norm.path, _Affine(made, norm.weight, norm.bias))

    return action


def _centered(tensor: Tensor, *, axis: int, factor: float) -> Tensor:
    return factor * (tensor - tensor.mean(axis, keepdim=True))


class _Affine(nn.Module):
    def __init__(self, norm: nn.Module, weight: Any, bias: Any) -> None:
        super().__init__()
        self.norm, self.weight, self.bias = norm, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.weight + self.bias


def dropping(sum_of: str, *, keep_branch: bool = False, also: str = "") -> Action:
    """Let the readers of a block's sum read the stream alone (or the branch alone), and scale another weight with it."""

    def action(program: Program, context: Context) -> None:
        add = next(n for n in program.graph.nodes if n.op == "call_function" and n.name == sum_of)
        stream, branch = add.args
        context.edit.rewire(add, branch if keep_branch else stream)
        context.edit.remove_unused([add] if keep_branch else [add, branch], "blocks.0", "dropped")
        context.edit.sweep()
        if also:
            context.edit.set_parameter(also, program.module.get_parameter(also) * 1.001)

    return action


def close(action: Action, bound: float) -> Pass:
    return step(action, Contract(CLOSE, NEW, bound=bound))


CENTERED = Centered(-1)
WRONG: dict[str, tuple[Pass, str]] = {
    "a writer forgotten": (step(centering(forgotten="places.weight")), "same"),
    "a bias forgotten": (step(centering(forgotten="blocks.1.second.bias")), "same"),
    "the mean of the other axis": (step(centering(axis=0)), "same"),
    "off by one part in ten thousand": (step(centering(factor=1.0001)), "same"),
    "the head centered with the words": (step(centering(tied=True)), "same"),
    "another eps": (step(centering(eps=1e-6)), "same"),
    "a head that is another after it was untied": (step(centering(head=1.001)), "same"),
    "centered without a map": (step(centering(mapped=False)), "same"),
    "a writer forgotten, and centered by word": (step(centering(forgotten="places.weight", relation=CENTERED)), "same"),
    "off by one part in ten thousand, centered by word": (step(centering(factor=1.0001, relation=CENTERED)), "same"),
    "another eps, centered by word": (step(centering(eps=1e-6, relation=CENTERED)), "same"),
    "another head behind what is centered by word": (step(centering(head=1.001, relation=CENTERED)), "same"),
    "a wrong word that would hide all": (step(centering(eps=1e-6, relation=Scaled(0.0))), "same"),
    "further than the bound": (close(dropping("add_1"), 1e-3), "close"),
    "the stream dropped in place of the branch": (close(dropping("add_1", keep_branch=True), 0.5), "close"),
    "another weight touched": (close(dropping("add_1", also="blocks.1.first.weight"), 1.0), "formula"),
    "a branch dropped that is promised to stay": (step(dropping("add_1")), "same"),
    "a branch dropped as a new function": (step(dropping("add_1"), Contract(NEW, NEW)), "formula"),
}
RIGHT: dict[str, Pass] = {
    "all writers centered": step(centering()),
    "all writers centered, found by the proof alone": step(centering(moved=False)),
    "all writers centered, by word": step(centering(relation=CENTERED)),
    "all writers centered, by a wrong word": step(centering(relation=Scaled(2.0))),
    "a branch dropped within its bound": close(dropping("add_1"), 1.0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_promise_is_stopped_by_name(name: str, tmp_path: Path) -> None:
    wrong, check = WRONG[name]
    with pytest.raises(VerificationError) as info:
        apply(program(), wrong, crash_folder=tmp_path)
    assert f": {check}" in str(info.value)


@pytest.mark.parametrize("name", RIGHT)
def test_right_twins_pass(name: str, tmp_path: Path) -> None:
    record = apply(program(), RIGHT[name], crash_folder=tmp_path).history[0]
    assert record.verification is not None
    assert record.verification.passed


def test_with_a_word_for_what_moves_each_part_is_held_where_it_stands(tmp_path: Path) -> None:
    counts = []
    for relation in (None, CENTERED):
        check = apply(program(), step(centering(relation=relation)), crash_folder=tmp_path).history[0].verification
        assert check is not None
        counts.append(int(next(c.detail for c in check.checks if c.name == "same").split(": ")[1].split()[0]))
    assert counts[0] == 1
    assert counts[1] > 8


class Halves(nn.Module):
    """The halves of a linear layer's result, multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.linear(x).chunk(2, -1)
        return one * other


@pytest.mark.parametrize("name", ["linear", "chunk"])
def test_what_reads_a_moved_value_is_held_though_nothing_in_it_changed(name: str, tmp_path: Path) -> None:
    """A chunk gives several tensors, its reader a product of two: neither is another operation, and both are felt."""

    def doubled(program: Program, context: Context) -> None:
        layers = [node for node, _ in program.layers()]
        context.edit.move(layers, "doubled", Scaled(2.0))
        for path in ("linear.weight", "linear.bias"):
            context.edit.set_parameter(path, lambda w: 2 * w, path)
        if name == "chunk":
            context.edit.move(list(layers[0].users), "doubled", Scaled(2.0))

    with pytest.raises(VerificationError, match=": same"):
        apply(capture(Halves(), (torch.randn(3, DIM),)), step(doubled), crash_folder=tmp_path)


class TwoBranches(nn.Module):
    """x + second1(drop(first1(x))) + second2(drop(first2(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.first1, self.first2 = nn.Linear(DIM, 6), nn.Linear(DIM, 6)
        self.drop1, self.drop2 = nn.Dropout(0.25), nn.Dropout(0.25)
        self.second1, self.second2 = nn.Linear(6, DIM, bias=False), nn.Linear(6, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second1(self.drop1(self.first1(x))) + self.second2(self.drop2(self.first2(x)))


class Wide(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(DIM, 12), nn.Dropout(rate), nn.Linear(12, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.first(x)))


def merging(rate: float) -> Action:
    """Both branches as one wide one, whose dropout draws as many numbers in another order."""

    def action(program: Program, context: Context) -> None:
        edit, nodes = context.edit, {n.name: n for n in program.graph.nodes}
        x, sums = nodes["x"], [n for n in nodes.values() if n.name in ("add", "add_1")]
        wide = edit.insert_layer("wide", Wide(rate), [x], after=x)
        for name, axis in (("first", 0), ("second", 1)):
            edit.set_parameter(
                f"wide.{name}.weight", functools.partial(_joined, axis=axis), f"{name}1.weight", f"{name}2.weight"
            )
        edit.set_parameter("wide.first.bias", functools.partial(_joined, axis=0), "first1.bias", "first2.bias")
        total = edit.insert_function(torch.ops.aten.add.Tensor, [x, wide], after=wide)
        edit.rewire(sums[1], total)
        edit.remove_unused([sums[1], *sums[1].all_input_nodes], "first1", "merged")
        edit.sweep()

    return action


def _joined(a: Tensor, b: Tensor, *, axis: int) -> Tensor:
    return torch.cat([a, b], axis)


def test_dropouts_of_other_sizes_are_held_at_rate_0_and_that_is_said(tmp_path: Path) -> None:
    before = capture(TwoBranches(), (torch.randn(2, 5, DIM),))
    record = apply(before, step(merging(0.25)), crash_folder=tmp_path).history[0]
    assert record.verification is not None
    assert any("dropouts of other sizes at rate 0" in check.detail for check in record.verification.checks)
    with pytest.raises(VerificationError, match="random draws"):
        apply(before, step(merging(0.0)), crash_folder=tmp_path)
    with pytest.raises(VerificationError, match="same"):
        apply(before, step(merging(0.5)), crash_folder=tmp_path)
