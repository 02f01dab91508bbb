"""The user's own class back, and what cannot be put into it, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import rewrite
from rewrite import NEW, Contract, Pass, Program, RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import call_arguments, tensor_value
from rewrite.pipeline.context import Context
from tests.captures import capture
from tests.models.stress import stress_cases

CASES = {c.name: c for c in stress_cases()}


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.fc(x)))


def converted(model: nn.Module) -> rewrite.Program:
    return rewrite.apply(model, "dyt", args=(torch.randn(4, 8),))


def test_it_is_the_users_class_and_computes_what_the_program_does() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    program = converted(model)
    made = rewrite.graft(program, model)
    x = torch.randn(3, 8)
    assert type(made) is Net
    assert type(made.norm).__name__ == "DynamicTanh"
    assert torch.equal(made.eval()(x), program.module.eval()(x))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert isinstance(model.norm, nn.LayerNorm)


def test_another_instance_takes_the_programs_weights() -> None:
    program = converted(Net())
    made = rewrite.graft(program, Net())
    assert torch.equal(made.fc.weight, program.module.fc.weight)


def test_another_width_or_class_is_refused_by_name() -> None:
    program = converted(Net())
    with pytest.raises(RewriteError, match=r"fc\.weight has shape"):
        rewrite.graft(program, Net(16))
    with pytest.raises(RewriteError, match="captured from"):
        rewrite.graft(program, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("name", "reason"), [("FunctionalLayerNorm", "is no module of your model"), ("HookedLayers", "does more than the layer")]
)
def test_what_is_no_whole_module_is_refused_by_name(name: str, reason: str) -> None:
    case = CASES[name]
    model = case.build()
    program = rewrite.apply(capture(model, *case.inputs(2, 12)), "dyt", verify=False)
    with pytest.raises(RewriteError, match=reason):
        rewrite.graft(program, model)


class NormAct(nn.LayerNorm):
    """A norm with its activation, a spelling of timm's; the first dropout is never called."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.unused = nn.Identity()
        self.drop = nn.Dropout(0.2)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)))


def test_a_norm_with_an_activation_becomes_a_sequence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), NormAct(8))
    program = converted(model)
    made = rewrite.graft(program, model)
    assert [type(m).__name__ for m in made[1]] == ["DynamicTanh", "Dropout", "PReLU"]
    torch.save(made, tmp_path / "made.pt")
    again = torch.load(tmp_path / "made.pt", weights_only=False)
    x = torch.randn(3, 8)
    assert torch.equal(again.eval()(x), program.module.eval()(x))


class NormActAct(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_child_that_is_called_twice_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), NormActAct(8))
    with pytest.raises(RewriteError, match="1 is a NormActAct, which does more"):
        rewrite.graft(converted(model), model)


def test_a_class_that_reads_what_the_new_layer_lacks_is_refused() -> None:
    """nn.TransformerEncoderLayer looks at the weights of its norms before it runs."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), torch.randn(2, 5, 8)
    with pytest.raises(RewriteError, match="your class does not run with the new layers at norm1, norm2: AttributeError"):
        rewrite.graft(rewrite.apply(model, "fold-affine", args=(x,)), model)


class Doing(Pass):
    """A pass that does what a test says, and promises nothing of the function."""

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)


def after(model: nn.Module, act: Callable[[Program, Editor], None], x: Tensor) -> Program:
    """The program of a model after some edits, recorded and not proven."""

    @dataclass(frozen=True)
    class Done(Doing):
        """As the test says."""

        name = "done"

        def run(self, program: Program, context: Context) -> None:
            act(program, context.edit)

    return rewrite.apply(model, [Done()], args=(x,), verify=False)


def call_of(program: Program, path: str) -> Node:
    return next(n for n in program.graph.nodes if n.target == path)


def insert_after(program: Program, edit: Editor, path: str, made: str, layer: nn.Module) -> None:
    call = call_of(program, path)
    edit.rewire(call, edit.insert_layer(made, layer, [call], after=call))


def insert_before(program: Program, edit: Editor, path: str, made: str, layer: nn.Module) -> None:
    call = call_of(program, path)
    source = call.all_input_nodes[0]
    new = edit.insert_layer(made, layer, [source], after=source)
    edit.rewire(source, new, lambda user: user is call)


X = torch.randn(4, 8)


def test_layers_beside_a_module_of_the_users_become_a_sequence_with_it(tmp_path: Path) -> None:
    def act(program: Program, edit: Editor) -> None:
        insert_after(program, edit, "fc", "scale", nn.Linear(8, 8))
        insert_before(program, edit, "fc", "pre", nn.LayerNorm(8))
        insert_after(program, edit, "scale", "act", nn.GELU())

    program = after(Net(), act, X)
    for one in (program, rewrite.load(rewrite.save(program, tmp_path / "net.pt2"))):
        made = rewrite.graft(one, Net())
        assert [*made.fc._modules] == ["pre", "layer", "scale", "act"]
        assert torch.equal(made.eval()(X), program.module.eval()(X))
        assert made.fc.in_features == 8


def test_a_layer_with_other_readers_has_no_place() -> None:
    def act(program: Program, edit: Editor) -> None:
        call = call_of(program, "norm")
        new = edit.insert_layer("extra", nn.Linear(8, 8), [call], after=call)
        product = edit.insert_function(torch.ops.aten.mul.Tensor, (call, new), after=new)
        edit.rewire(call, product, lambda user: user not in (new, product))

    for verify in (True, False):
        with pytest.raises(RewriteError, match=r"extra, which pass done inserted|insert at mul"):
            rewrite.graft(after(Net(), act, X), Net(), verify=verify)


def test_what_a_later_pass_took_back_counts_no_more() -> None:
    net = QKV()
    program = rewrite.apply(net, "merge-linears,split-linears", args=(X,))
    made = rewrite.graft(program, net)
    assert torch.equal(made.eval()(X), net.eval()(X))
    assert [*made.state_dict()] == [*net.state_dict()]


class QKV(nn.Module):
    """Three projections of one value, in so many heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, 2)) for layer in (self.q, self.k, self.v))
        return self.o((torch.softmax(q @ k.mT, -1) @ v).flatten(-2))


def fewer_heads(program: Program, edit: Editor, *, attribute: bool = True) -> None:
    """The last two heads go: rows of q, k, v, columns of o."""
    for name in ("q", "k", "v"):
        edit.set_parameter(f"{name}.weight", lambda w: w[:4], f"{name}.weight")
        edit.set_parameter(f"{name}.bias", lambda b: b[:4], f"{name}.bias")
    edit.set_parameter("o.weight", lambda w: w[:, :4], "o.weight")
    for node in program.graph.nodes:
        named, value = call_arguments(node), tensor_value(node)
        if value is None or value.dim() != 3:
            continue
        if "unflatten" in node.name:
            edit.set_literal(node, "sizes", [2, 2])
        elif ("shape" in named or "size" in named) and named.get("self") is not None:
            name = "shape" if "shape" in named else "size"
            edit.set_literal(node, name, [*named[name][:-2], 2, 2])
    if attribute:
        edit.set_attribute("attn", "num_heads", 2)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = QKV()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


def in_attn(program: Program, edit: Editor, *, attribute: bool = True) -> None:
    class At:
        """An editor whose paths begin at ``attn``."""

        def set_parameter(self, path: str, compute: Callable[..., Tensor], source: str) -> None:
            edit.set_parameter(f"attn.{path}", compute, f"attn.{source}")

        def __getattr__(self, name: str) -> object:
            return getattr(edit, name)

    fewer_heads(program, At(), attribute=attribute)  # type: ignore[arg-type]


def test_sizes_and_the_attributes_that_follow_them_are_given_back(tmp_path: Path) -> None:
    program = after(Wrapped(), in_attn, X)
    for one in (program, rewrite.load(rewrite.save(program, tmp_path / "heads.pt2"))):
        made = rewrite.graft(one, Wrapped())
        assert made.attn.num_heads == 2
        assert (made.attn.q.out_features, made.attn.o.in_features) == (4, 4)
        assert made.attn.q.weight.shape == (4, 8)
        assert torch.equal(made.eval()(X), program.module.eval()(X))


def test_a_literal_that_no_attribute_of_the_class_gives_is_refused_by_name() -> None:
    program = after(Wrapped(), lambda p, e: in_attn(p, e, attribute=False), X)
    for verify in (True, False):
        with pytest.raises(RewriteError, match="set literal at"):
            rewrite.graft(program, Wrapped(), verify=verify)


def test_an_attribute_that_the_class_does_not_have_is_refused_by_name() -> None:
    program = after(Net(), lambda p, e: e.set_attribute("fc", "width", 3), X)
    with pytest.raises(RewriteError, match="set width at fc, which your class has not"):
        rewrite.graft(program, Net(), verify=False)


def test_a_parameter_that_came_has_a_place_where_the_class_has_its_name() -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8, bias=False)

    program = after(Bare(), lambda p, e: e.set_parameter("fc.bias", lambda w: w.sum(1), "fc.weight"), X)
    made = rewrite.graft(program, Bare())
    assert torch.equal(made.fc.bias, made.fc.weight.sum(1))
    stranger = after(Bare(), lambda p, e: e.set_parameter("fc.gain", lambda w: w.sum(1), "fc.weight"), X)
    with pytest.raises(RewriteError, match=r"fc\.gain of the program has no place in it"):
        rewrite.graft(stranger, Bare(), verify=False)


def drop_the_norm(program: Program, edit: Editor) -> None:
    call = call_of(program, "norm")
    edit.rewire(call, call.all_input_nodes[0])
    edit.remove(call)
    edit.sweep()


def test_what_was_removed_gives_back_its_input() -> None:
    program = after(Net(), drop_the_norm, X)
    made = rewrite.graft(program, Net())
    assert type(made.norm) is nn.Identity
    assert torch.equal(made.eval()(X), program.module.eval()(X))


def take_the_norm_over(program: Program, edit: Editor) -> None:
    """The norm goes, and an operator that came by an edit is read in its place."""
    call = call_of(program, "norm")
    made = edit.insert_function(torch.ops.aten.mul.Tensor, (call.all_input_nodes[0], 2.0), after=call)
    edit.rewire(call, made)
    edit.remove(call)
    edit.sweep()


def another_function(program: Program, edit: Editor) -> None:
    call = call_of(program, "norm")
    made = edit.insert_function(torch.ops.aten.mul.Tensor, (call, 2.0), after=call)
    edit.rewire(call, made, lambda user: user is not made)


SILENT = {
    "removed": (take_the_norm_over, "pass done took norm out"),
    "rewired": (lambda p, e: e.rewire(call_of(p, "norm"), call_of(p, "fc"), lambda u: u.target == "drop"), "rewire at fc"),
    "inserted": (another_function, "insert at mul"),
}


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize("verify", [True, False])
def test_no_edit_is_left_out_silently(kind: str, verify: bool) -> None:
    act, words = SILENT[kind]
    program = after(Net(), act, X)
    with pytest.raises(RewriteError, match=words):
        rewrite.graft(program, Net(), verify=verify)
