"""The edit layer: each edit journaled, with values, metadata and provenance right at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite import Program, RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten, module_path
from rewrite.proof.frame import differs
from tests.captures import capture

DIM = 8


class Small(nn.Module):
    """Two linear layers with a norm that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.second = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.norm(self.first(x)) + x))


class Tied(nn.Module):
    """A head that has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, DIM)
        self.head = nn.Linear(DIM, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(DIM))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) * self.scale)


def small() -> tuple[Program, Editor]:
    torch.manual_seed(0)
    program = capture(Small(), (torch.randn(2, DIM),)).clone()
    return program, Editor(program, "test{}")


def calls(program: Program, path: str) -> list[Node]:
    return [node for node, _ in program.layers() if node.target == path]


def run(program: Program, *args: Any) -> Tensor:
    program.graph.lint()
    program.module.recompile()
    result: Tensor = program.module(*(args or (torch.randn(3, DIM),)))
    return result


def values_are_right(program: Program) -> bool:
    """Whether each node's FakeTensor has the shape and dtype that the node really computes."""
    x = torch.randn(*[int(s) for s in program.graph.find_nodes(op="placeholder")[0].meta["val"].shape])
    program.module.recompile()
    seen: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    Recorder(program.module, graph=program.graph).run(x)
    return all(
        (tuple(map(int, n.meta["val"].shape)), n.meta["val"].dtype) == (tuple(v.shape), v.dtype)
        for n in program.graph.nodes
        if isinstance(v := seen.get(n.name), Tensor)
    )


def test_replaced_layer_serves_every_call() -> None:
    program, edit = small()
    layer = nn.RMSNorm(DIM)
    edit.replace_layer("norm", layer)
    assert program.module.norm is layer
    assert [program.layer(n) for n in calls(program, "norm")] == [layer, layer]
    assert run(program).shape == (3, 3)
    (change,) = edit.changes
    assert (change.kind, change.path, change.detail) == ("replace layer", "norm", "LayerNorm -> RMSNorm")
    assert type(change.old) is nn.LayerNorm
    assert change.new is layer


def test_one_call_of_a_layer_is_replaced_at_a_path_of_its_own() -> None:
    program, edit = small()
    old = program.module.norm
    edit.replace_layer("norm", nn.RMSNorm(DIM), calls(program, "norm")[1:])
    assert program.module.norm is old
    assert [str(n.target) for n, _ in program.layers()] == ["first", "norm", "norm_1", "second"]
    assert edit.changes[0].path == "norm_1"
    assert run(program).shape == (3, 3)


def test_layer_of_another_shape_or_dtype_is_refused() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    for layer in (nn.Linear(DIM, 5), Double()):
        _, edit = small()
        with pytest.raises((RewriteError, RuntimeError)):
            edit.replace_layer("norm", layer)
        assert edit.changes == []


def test_shape_error_says_what_was_and_what_would_be() -> None:
    _, edit = small()
    with pytest.raises(RewriteError, match=r"the new layer at second gives .*5.* where the old one gave .*3"):
        edit.replace_layer("second", nn.Linear(DIM, 5))


def test_replacement_takes_the_mode_of_the_old_layer() -> None:
    program, edit = small()
    program.module.eval()
    edit.replace_layer("norm", nn.RMSNorm(DIM))
    assert not program.module.norm.training


def test_inserted_layer() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    made = edit.insert_layer("gate", nn.Linear(DIM, 4), [first], after=first)
    assert tuple(made.meta["val"].shape)[1:] == (4,)
    assert made.prev is first
    assert module_path(made) == ""  # beside the layer, not in it
    assert type(program.module.gate) is nn.Linear
    assert edit.changes[0].kind == "insert"
    assert values_are_right(program)


def test_inserted_layer_below_a_new_path() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    edit.insert_layer("extra.inner.gate", nn.ReLU(), [first], after=first)
    assert "extra.inner.gate" in dict(program.module.named_modules())


def test_path_that_is_taken_is_refused() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    with pytest.raises(RewriteError, match="there is a module at norm already"):
        edit.insert_layer("norm", nn.ReLU(), [first], after=first)


def test_inserted_function_and_rewire() -> None:
    program, edit = small()
    x = torch.randn(3, DIM)
    expected = run(program, x)
    (first,) = calls(program, "first")
    negated = edit.insert_function(aten.neg.default, [first], after=first)
    again = edit.insert_function(aten.neg.default, [negated], after=negated)
    edit.rewire(first, again, users=lambda user: user not in (negated, again))
    assert [u.name for u in first.users] == [negated.name]
    assert [c.kind for c in edit.changes] == ["insert", "insert", "rewire"]
    assert torch.equal(run(program, x), expected)
    assert values_are_right(program)


def test_inserted_function_computes_its_value_at_once() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    made = edit.insert_function(aten.sum.dim_IntList, [first, [-1]], {"dtype": torch.float64}, after=first)
    assert made.meta["val"].dim() == 1
    assert made.meta["val"].dtype is torch.float64
    assert made.meta["val"].shape[0] == first.meta["val"].shape[0], "the batch stays the same symbol"


def test_only_unused_nodes_are_removed() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    with pytest.raises(RewriteError, match="is still used by"):
        edit.remove(first)
    made = edit.insert_function(aten.neg.default, [first], after=first)
    edit.remove(made)
    assert made not in program.graph.nodes
    assert edit.changes[-1].kind == "remove"


def test_rewire_that_finds_no_user_changes_nothing() -> None:
    program, edit = small()
    (first,) = calls(program, "first")
    norm = calls(program, "norm")[0]
    edit.rewire(first, norm, users=lambda user: False)
    assert [c.kind for c in edit.changes] == []


def test_set_parameter_reaches_every_place_of_a_tie_and_writes_nothing() -> None:
    model = Tied()
    before = model.head.weight.detach().clone()
    program = capture(model, (torch.randint(0, 13, (2, 5)),)).clone(share=True)
    edit = Editor(program, "test")
    edit.set_parameter("head.weight", torch.zeros(13, DIM))
    assert program.module.head.weight is program.module.embedding.weight
    assert not program.module.head.weight.any()
    assert torch.equal(model.head.weight, before)
    edit.set_parameter("scale", torch.full((DIM,), 2.0))
    assert torch.equal(program.module.scale, torch.full((DIM,), 2.0))
    assert torch.equal(model.scale, torch.ones(DIM))
    assert [c.path for c in edit.changes] == ["head.weight", "scale"]


def test_set_parameter_keeps_requires_grad_and_copies_the_value() -> None:
    program, edit = small()
    program.module.first.bias.requires_grad_(False)
    value = torch.ones(DIM)
    edit.set_parameter("first.bias", value)
    assert not program.module.first.bias.requires_grad
    value.zero_()
    assert program.module.first.bias.all()


def test_unknown_parameter_is_an_error() -> None:
    _, edit = small()
    with pytest.raises(RewriteError, match=r"there is no parameter or buffer first\.gain"):
        edit.set_parameter("first.gain", torch.ones(1))


def test_metadata_and_provenance_are_kept() -> None:
    program, edit = small()
    old = [dict(n.meta) for n in calls(program, "norm")]
    edit.replace_layer("norm", nn.RMSNorm(DIM))
    for node, meta in zip(calls(program, "norm"), old, strict=True):
        for key in ("nn_module_stack", "whole", "stack_trace"):
            assert node.meta.get(key) == meta.get(key)
        assert node.meta["provenance"] == ({"pass": "test{}", "from": (node.name,)},)
    edit.author = "later"
    edit.replace_layer("norm", nn.LayerNorm(DIM))
    assert [p["pass"] for p in calls(program, "norm")[0].meta["provenance"]] == ["test{}", "later"]


def test_provenance_survives_a_clone_and_stays_out_of_the_original() -> None:
    program, _ = small()
    copied = program.clone()
    Editor(copied, "copy").replace_layer("norm", nn.RMSNorm(DIM))
    assert "provenance" not in calls(program, "norm")[0].meta
    assert calls(copied.clone(), "norm")[0].meta["provenance"]
    assert type(program.module.norm) is nn.LayerNorm


def test_children_of_a_replaced_layer_stay_below_the_new_one() -> None:
    program, edit = small()
    program.module.norm.add_module("inner", nn.ReLU())
    layer = nn.RMSNorm(DIM)
    edit.replace_layer("norm", layer)
    assert type(layer.inner) is nn.ReLU


def test_a_refused_replacement_leaves_everything_as_it_was() -> None:
    """The shape is checked before the first change: module, graph, metadata, journal and the new layer too."""
    program, edit = small()
    before, layer = program.clone(), nn.Linear(DIM, 5)
    old, meta = program.module.norm, [dict(n.meta) for n in program.graph.nodes]
    for calls_of_it in (None, calls(program, "norm")[1:]):
        with pytest.raises(RewriteError, match="the new layer at norm gives"):
            edit.replace_layer("norm", layer, calls_of_it)
    assert program.module.norm is old
    assert edit.changes == []
    assert [dict(n.meta) for n in program.graph.nodes] == meta
    assert not differs(before, program)
    assert layer.training
    assert not layer._modules


def test_a_path_without_a_layer_is_refused_by_name() -> None:
    _, edit = small()
    with pytest.raises(RewriteError, match="there is no layer at nowhere"):
        edit.replace_layer("nowhere", nn.ReLU())


def test_shapes_are_inferred_once_for_layers_alike() -> None:
    """By what a layer is, not by which: another width, class or attribute is inferred anew."""

    class Counting(nn.Module):
        runs = 0

        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            Counting.runs += 1
            return x * self.weight[:1]

    program, edit = small()
    widths = (2, 2, 3, 2)
    for width in widths:
        edit.replace_layer("norm", Counting(width))
    assert Counting.runs == len(set(widths)), "for both calls of the layer, which are of one shape"
    again = Editor(program.clone(), "again")
    again.replace_layer("norm", Counting(3))
    assert Counting.runs == len(set(widths)), "copies of a program know it too"


class Branching(nn.Module):
    """A branch with a layer, a free parameter and a container of its own, beside what stays."""

    def __init__(self) -> None:
        super().__init__()
        self.keep = nn.Linear(4, 4)
        self.branch = nn.ModuleDict({"inner": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(x) * self.shift + self.branch["inner"]["fc"](x) * self.scale


def _without_branch(program: Program) -> Editor:
    """The program with its branch cut off, by hand."""
    edit = Editor(program, "test")
    add = next(n for n in program.graph.nodes if "add" in n.name)
    product = add.args[1]
    edit.rewire(add, add.args[0])
    for node in (add, product, product.args[0]):
        edit.remove(node)
    edit.sweep()
    program.module.recompile()
    return edit


def test_sweep_takes_the_parameters_and_containers_of_a_removed_branch_and_nothing_else() -> None:
    program = capture(Branching(), (torch.randn(3, 4),)).clone()
    edit = _without_branch(program)
    assert list(program.module.state_dict()) == ["shift", "unused", "keep.weight", "keep.bias"]
    assert [n for n, _ in program.module.named_modules()] == ["", "keep"]
    swept = {c.path: c.detail for c in edit.changes if c.kind == "sweep"}
    assert swept == {
        "branch.inner.fc": "nothing calls it any more",
        "branch.inner": "nothing is left in it",
        "branch": "nothing is left in it",
        "scale": "nothing reads it any more",
    }


def test_sweep_keeps_a_parameter_that_something_else_reads() -> None:
    class Shared(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.keep(x) * self.scale + self.branch["inner"]["fc"](x) * self.scale

    program = capture(Shared(), (torch.randn(3, 4),)).clone()
    _without_branch(program)
    assert "scale" in program.module.state_dict()


def test_sweep_keeps_layers_below_a_swept_layer_that_are_called() -> None:
    program = capture(nn.Sequential(nn.Linear(4, 4), nn.GELU()), (torch.randn(3, 4),)).clone()
    edit = Editor(program, "test")
    edit.replace_layer("1", WithInner())
    node = next(n for n in program.graph.nodes if n.target == "1")
    inner = edit.insert_layer("1.inner2", nn.ReLU(), node.args, after=node)
    edit.rewire(node, inner)
    edit.remove(node)
    edit.sweep()
    program.module.recompile()
    assert program.module(torch.randn(3, 4)).shape == (3, 4)
    assert [n for n, _ in program.module.named_modules()] == ["", "0", "1", "1.inner2"]


class WithInner(nn.Module):
    """A layer with a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_sweep_says_who_still_reads_a_parameter_of_a_layer_that_goes() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) * self.b.bias

    program = capture(Reads(), (torch.randn(3, 4),)).clone()
    edit = Editor(program, "test")
    call = next(n for n in program.graph.nodes if n.target == "b")
    edit.rewire(call, call.args[0])
    edit.remove(call)
    with pytest.raises(RewriteError, match=r"b\.bias goes with its layer, and mul\w* reads it"):
        edit.sweep()


def test_what_only_removed_nodes_used_goes_with_them_and_leaves_the_tree() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale, self.kept = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.kept + self.inner(x) * self.scale * self.kept

    program = capture(Scaled(), (torch.randn(2, 4),)).clone()
    edit = Editor(program, "test")
    add = next(n for n in program.graph.nodes if n.name == "add")
    edit.rewire(add, add.args[0])
    edit.remove_unused([add], "inner", "a branch")
    edit.sweep()
    program.module.recompile()
    assert list(program.module.state_dict()) == ["kept"]
    assert [c.kind for c in edit.changes] == ["rewire", "remove", "sweep", "sweep"]
    assert edit.changes[1].path == "inner"
    assert torch.equal(program.module(torch.ones(1, 4)), torch.ones(1, 4))
