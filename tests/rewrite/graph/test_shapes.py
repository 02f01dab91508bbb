"""Edits that change shapes: literals, layers and parameters of other sizes, what follows, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewrite import NEW, SAME, Contract, Pass, Program, RewriteError, VerificationError, apply
from rewrite.graph.edit import Editor
from rewrite.graph.nodes import aten, packet
from rewrite.graph.sizes import followed
from rewrite.pipeline.context import Context
from rewrite.proof.frame import frame
from tests.captures import capture

X = torch.randn(2, 6, 8)


class Heads(nn.Module):
    """A linear layer whose output is cut into heads, and another that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.tanh(y.reshape(*y.shape[:-1], self.heads, 4))
        return self.down(y.flatten(-2))


def reshape_of(program: Program) -> Any:
    return next(n for n in program.graph.nodes if packet(n) in (aten.reshape, aten.view) and n.meta["val"].dim() == 4)


def sized(node: Any, *last: int) -> list[Any]:
    return [*node.args[1][:-2], *last]


Act = Callable[[Program, Context], None]


@dataclass(frozen=True)
class Steps(Pass):
    """What a test gives it to do; the same function, if the test is right."""

    name = "steps"
    promise: str = "same"
    seen: str = ""
    act = staticmethod(lambda program, context: None)

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME) if self.promise == "same" else Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        type(self).act(program, context)


def doing(act: Act) -> Pass:
    @dataclass(frozen=True)
    class Doing(Steps):
        """As the test says."""

    Doing.act = staticmethod(act)
    return Doing()


def test_a_literal_is_set_journaled_and_proven() -> None:
    def act(program: Program, context: Context) -> None:
        node = reshape_of(program)
        context.edit.set_literal(node, "shape" if packet(node) is aten.reshape else "size", sized(node, 2, 8))

    program = apply(Heads(), [doing(act)], args=(X,))
    (record,) = program.history
    assert [site.kind for site in record.changes] == ["set literal"]
    assert tuple(reshape_of(program).meta["val"].shape[-2:]) == (2, 8)
    assert record.verification is not None
    assert record.verification.passed


def test_a_literal_that_no_journal_names_is_a_change() -> None:
    before = capture(Heads(), (X,))
    after = before.clone()
    node = reshape_of(after)
    node.update_arg(1, sized(node, 2, 8))
    assert not frame(before, after, ()).passed


def test_only_literals_can_be_set_and_only_where_there_are_any() -> None:
    program = capture(Heads(), (X,)).clone()
    edit, node = Editor(program, "test"), reshape_of(program)
    name = "shape" if packet(node) is aten.reshape else "size"
    with pytest.raises(RewriteError, match="has no argument dims: it has self"):
        edit.set_literal(node, "dims", [1])
    with pytest.raises(RewriteError, match="reads other nodes then"):
        edit.set_literal(node, name, [node.args[0], 2])


def halved(program: Program, context: Context, *, reader: bool = True) -> None:
    """Half as many hidden features; the last of them must be zero weights for SAME, so the promise is NEW."""
    edit = context.edit
    edit.set_parameter("up.weight", lambda w: w[:8], "up.weight")
    edit.set_parameter("up.bias", lambda b: b[:8], "up.bias")
    node = reshape_of(program)
    edit.set_literal(node, "shape" if packet(node) is aten.reshape else "size", sized(node, 2, 4))
    if reader:
        edit.set_parameter("down.weight", lambda w: w[:, :8], "down.weight")


def test_attributes_follow_and_values_are_inferred_anew() -> None:
    program = apply(Heads(), [doing(halved)], args=(X,), verify=False)
    up, down = program.module.get_submodule("up"), program.module.get_submodule("down")
    assert (up.out_features, down.in_features) == (8, 8)
    assert [s.detail for s in program.history[0].changes if s.kind == "set attribute"] == [
        "out_features: 16 -> 8",
        "in_features: 16 -> 8",
    ]
    assert tuple(reshape_of(program).meta["val"].shape[-2:]) == (2, 4)
    assert program.module(X).shape == X.shape


def test_a_graph_that_does_not_fit_is_one_error_with_the_node() -> None:
    with pytest.raises(RewriteError, match=r"\(the layer at down\) does not fit what it is given now"):
        apply(Heads(), [doing(lambda program, context: halved(program, context, reader=False))], args=(X,))


def ones(inner: int, out: int) -> nn.Linear:
    layer = nn.Linear(inner, out)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    return layer


def test_a_layer_of_another_shape_needs_the_word_and_its_readers(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU())

    def act(program: Program, context: Context, *, reshape: bool = True, reader: bool = True) -> None:
        context.edit.replace_layer("0", ones(8, 4), reshape=reshape)
        if reader:
            context.edit.replace_layer("1", ones(4, 8))

    with pytest.raises(RewriteError, match=r"the new layer at 0 gives .* reshape=True\) where its readers are edited"):
        apply(net, [doing(lambda p, c: act(p, c, reshape=False))], args=(X,))
    with pytest.raises(RewriteError, match=r"\(the layer at 1\) does not fit what it is given now"):
        apply(net, [doing(lambda p, c: act(p, c, reader=False))], args=(X,))
    program = apply(net, [doing(act)], args=(X,), verify=False)
    assert program.module(X).shape == (2, 6, 8)
    with pytest.raises(VerificationError, match="same: "):
        apply(net, [doing(act)], args=(X,), crash_folder=tmp_path)


@dataclass(frozen=True)
class Grown:
    layer: nn.Module
    weight: tuple[int, ...]
    follow: dict[str, Any] = field(default_factory=dict)


GROWN = [
    Grown(nn.Linear(4, 6), (5, 3), {"out_features": 5, "in_features": 3}),
    Grown(nn.Embedding(9, 4), (9, 3), {"embedding_dim": 3}),
    Grown(nn.Conv2d(4, 6, 3, groups=2), (4, 1, 3, 3), {"out_channels": 4, "in_channels": 2}),
    Grown(nn.ConvTranspose1d(4, 6, 3), (2, 3, 3), {"in_channels": 2, "out_channels": 3}),
    Grown(nn.BatchNorm1d(4), (3,), {"num_features": 3}),
    Grown(nn.GroupNorm(2, 4), (2,), {"num_channels": 2}),
    Grown(nn.LayerNorm(4), (3,), {"normalized_shape": (3,)}),
    Grown(nn.RMSNorm(4), (3,), {"normalized_shape": (3,)}),
    Grown(nn.ReLU(), (), {}),
]


@pytest.mark.parametrize("grown", GROWN, ids=[type(g.layer).__name__ for g in GROWN])
def test_which_attributes_follow(grown: Grown) -> None:
    assert dict(followed(grown.layer)) == {}
    if grown.weight:
        grown.layer.weight = nn.Parameter(torch.zeros(grown.weight))
    assert dict(followed(grown.layer)) == grown.follow
