"""Nothing outside the edits may change: each way of touching something else is found, and is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import Program
from rewrite.graph.change import Change
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten
from rewrite.proof.frame import differs, frame
from tests.captures import capture

DIM = 6
Action = Callable[[Program, Editor], None]


class Scaled(nn.Linear):
    """A linear layer with a factor that is a plain attribute."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(DIM, DIM)
        self.factor = factor
        self.notes = {"shape": [DIM, DIM], "limits": (0.0, float("nan"))}


class GELU(nn.Module):
    """Not torch's GELU, but called so."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Net(nn.Module):
    """Layers with ties, a frozen layer, a buffer that is not saved, a layer called twice, a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.2)
        self.second = nn.Linear(DIM, DIM)
        self.third = nn.Linear(DIM, DIM)
        self.third.weight = self.second.weight
        self.shift = nn.Parameter(torch.randn(DIM))
        self.register_buffer("frequencies", torch.arange(DIM).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.first(x)))) + self.shift
        return self.third(self.second(self.act(x) * self.frequencies))


def program() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(3, DIM),))


def after(action: Action) -> tuple[Program, Program, list[Change]]:
    before = program()
    result = before.clone()
    editor = Editor(result, "test")
    action(result, editor)
    return before, result, editor.changes


def swap(program: Program, edit: Editor) -> None:
    edit.replace_layer("norm", nn.RMSNorm(DIM))


def node(program: Program, name: str) -> Any:
    return next(n for n in program.graph.nodes if n.name == name or n.target == name)


# -------------------- what is seen ----------------------------------------------------------------------------


def hook(program: Program, edit: Editor) -> None:
    program.module.first.register_forward_hook(lambda layer, inputs, output: 2 * output)


def freeze(program: Program, edit: Editor) -> None:
    program.module.second.bias.requires_grad_(False)


def another_buffer(program: Program, edit: Editor) -> None:
    with torch.no_grad():
        program.module.frequencies.mul_(2)


def a_negative_zero(program: Program, edit: Editor) -> None:
    program.module.frequencies[0] = -0.0


def a_saved_buffer(program: Program, edit: Editor) -> None:
    program.module._non_persistent_buffers_set.clear()


def another_rate(program: Program, edit: Editor) -> None:
    program.module.drop.p = 0.9


def another_class_of_that_name(program: Program, edit: Editor) -> None:
    program.module.act = GELU()


def another_mode(program: Program, edit: Editor) -> None:
    program.module.drop.eval()


def a_parameter_that_is_a_buffer(program: Program, edit: Editor) -> None:
    shift = program.module._parameters.pop("shift")
    program.module.register_buffer("shift", shift.detach())


def an_untied_weight(program: Program, edit: Editor) -> None:
    program.module.third.weight = nn.Parameter(program.module.third.weight.detach().clone())


def a_tied_bias(program: Program, edit: Editor) -> None:
    program.module.third.bias = program.module.second.bias


def an_order_of_parameters(program: Program, edit: Editor) -> None:
    held = program.module.first._parameters
    held["weight"] = held.pop("weight")


def a_module_more(program: Program, edit: Editor) -> None:
    program.module.first.add_module("extra", nn.Identity())


def a_module_less(program: Program, edit: Editor) -> None:
    del program.module.second.weight
    program.module.second = nn.Linear(DIM, DIM)


def a_rewired_call(program: Program, edit: Editor) -> None:
    second = node(program, "second")
    second.replace_input_with(second.args[0], second.args[0].args[0])


def a_literal(program: Program, edit: Editor) -> None:
    add = next(n for n in program.graph.nodes if n.target is aten.add.Tensor)
    add.kwargs = {"alpha": 2}


def another_operator(program: Program, edit: Editor) -> None:
    next(n for n in program.graph.nodes if n.target is aten.add.Tensor).target = aten.sub.Tensor


def a_node_more(program: Program, edit: Editor) -> None:
    with program.graph.inserting_after(node(program, "first")):
        program.graph.call_function(aten.neg.default, (node(program, "first"),))


def an_order_of_nodes(program: Program, edit: Editor) -> None:
    reads = [n for n in program.graph.nodes if n.op == "get_attr"]
    reads[-1].append(reads[0])


def another_call_of_the_layer(program: Program, edit: Editor) -> None:
    program.module.add_module("other", nn.GELU())
    next(n for n in program.graph.nodes if n.target == "act").target = "other"


UNSEEN: list[Action] = [
    hook,
    freeze,
    another_buffer,
    a_negative_zero,
    a_saved_buffer,
    another_rate,
    another_class_of_that_name,
    another_mode,
    a_parameter_that_is_a_buffer,
    an_untied_weight,
    a_tied_bias,
    an_order_of_parameters,
    a_module_more,
    a_module_less,
    a_rewired_call,
    a_literal,
    another_operator,
    a_node_more,
    an_order_of_nodes,
    another_call_of_the_layer,
]


@pytest.mark.parametrize("action", UNSEEN, ids=lambda a: a.__name__)
@pytest.mark.parametrize("edited", [False, True], ids=["alone", "beside an edit"])
def test_what_no_edit_accounts_for_is_found(action: Action, edited: bool) -> None:
    def both(program: Program, edit: Editor) -> None:
        if edited:
            swap(program, edit)
        action(program, edit)

    before, result, changes = after(both)
    check = frame(before, result, changes)
    assert not check.passed
    assert check.detail.endswith(", and no edit accounts for it")
    assert differs(before, result)


# -------------------- what the journal is held to -------------------------------------------------------------


def test_a_layer_swapped_again_past_the_journal() -> None:
    def action(program: Program, edit: Editor) -> None:
        swap(program, edit)
        program.module.norm = nn.RMSNorm(DIM)

    before, result, changes = after(action)
    assert "another layer is there than the journal names" in frame(before, result, changes).detail


def test_a_layer_that_was_changed_before_it_was_replaced() -> None:
    def action(program: Program, edit: Editor) -> None:
        with torch.no_grad():
            program.module.norm.weight.mul_(2)
        swap(program, edit)

    before, result, changes = after(action)
    assert "norm: the layer that was replaced is not what it was" in frame(before, result, changes).detail


def test_a_layer_below_an_edited_one_that_the_graph_calls() -> None:
    class NormAct(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(DIM)
            self.act = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    before = capture(nn.Sequential(NormAct()), (torch.randn(3, DIM),))
    for spoil, passed in ((False, True), (True, False)):
        result = before.clone()
        editor = Editor(result, "test")
        editor.replace_layer("0", nn.RMSNorm(DIM))
        if spoil:
            with torch.no_grad():
                result.module.get_submodule("0.act").weight.mul_(2)
        assert frame(before, result, editor.changes).passed is passed


def test_a_tensor_that_the_graph_reads_from_an_edited_layer() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(DIM)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * self.norm.weight

    before = capture(Reader(), (torch.randn(3, DIM),))
    result = before.clone()
    editor = Editor(result, "test")
    layer = nn.RMSNorm(DIM)
    nn.init.constant_(layer.weight, 2)
    editor.replace_layer("norm", layer)
    assert "the tensor norm.weight changed" in frame(before, result, editor.changes).detail


# -------------------- what is right ---------------------------------------------------------------------------


def test_a_copy_does_not_differ() -> None:
    model = nn.Sequential(Scaled(), nn.Dropout(0.1))
    model[0].register_forward_pre_hook(lambda layer, inputs: None)
    for before in (program(), capture(model, (torch.randn(3, DIM),))):
        assert not differs(before, before.clone())
        assert not differs(before, before.clone(share=True))


@pytest.mark.parametrize("attribute", ["factor", "notes"])
def test_plain_attributes_count_by_value(attribute: str) -> None:
    captured = program()
    for value, same in ((getattr(Scaled(), attribute), True), ({"shape": [DIM, DIM + 1], "limits": (0.0, 1.0)}, False)):
        before, result = captured.clone(), captured.clone()
        before.module.first.extra, result.module.first.extra = getattr(Scaled(), attribute), value
        assert ("attribute extra changed" in frame(before, result, ()).detail) is not same
        assert differs(before, result) is not same


def edits_of_each_kind(program: Program, edit: Editor) -> None:
    swap(program, edit)
    first = node(program, "first")
    made = edit.insert_layer("new.gate", nn.Linear(DIM, DIM), [first], after=first)
    negated = edit.insert_function(aten.neg.default, [made], after=made)
    edit.rewire(first, negated, users=lambda user: user is not made)
    drop = node(program, "drop")
    edit.rewire(drop, drop.args[0])
    edit.remove(drop)
    edit.set_parameter("third.weight", torch.zeros(DIM, DIM))


def one_of_two_calls(program: Program, edit: Editor) -> None:
    edit.replace_layer("act", nn.ReLU(), [n for n in program.graph.nodes if n.target == "act"][1:])


def replaced_twice(program: Program, edit: Editor) -> None:
    swap(program, edit)
    edit.replace_layer("norm", nn.Identity())


def wrapped(program: Program, edit: Editor) -> None:
    edit.replace_layer("norm", nn.Sequential(program.module.norm))


@pytest.mark.parametrize(
    "action", [swap, edits_of_each_kind, one_of_two_calls, replaced_twice, wrapped], ids=lambda a: a.__name__
)
def test_what_edits_account_for_passes(action: Action) -> None:
    before, result, changes = after(action)
    check = frame(before, result, changes)
    assert check.passed, check.detail
    assert differs(before, result)
    assert not frame(before, result, changes[1:]).passed or len(changes) > 1


def test_a_layer_under_two_names_is_edited_under_both() -> None:
    model = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM))
    model.register_module("again", model[0])
    before = capture(model, (torch.randn(3, DIM),))
    result = before.clone()
    editor = Editor(result, "test")
    editor.replace_layer("0", nn.RMSNorm(DIM))
    assert result.module.again is result.module.get_submodule("0")
    assert frame(before, result, editor.changes).passed
