"""One form of a cut as a function: its nodes run on given border values and on tensors of its own, exactly or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.maps import ParameterMap
from rewrite.graph.nodes import attribute
from rewrite.graph.relation import Relation
from rewrite.numerics.modes import mode_readers
from rewrite.torch_private import pytree

from .cuts import Cut
from .draws import Drawn, SeededDraws
from .setting import Setting, contexts, given_to, leaf, projection
from .tensors import TensorsOf, World


@dataclass
class Outcome:
    """What one run of a form gave: output tensors, gradients by the name of a border or parameter, state afterwards.

    ``followed`` are buffers that are functions of old ones, after the run, with their maps; ``sources`` the old parameters
    whose gradient lacks what goes through parameters of which others have their own.
    """

    outputs: list[torch.Tensor]
    requires_grad: list[bool]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    followed: dict[str, tuple[ParameterMap, torch.Tensor]] = field(default_factory=dict)
    inputs: list[torch.Tensor] = field(default_factory=list)
    draws: int = 0
    drawn: tuple[Drawn, ...] = ()
    aliased: list[bool] = field(default_factory=list)
    sources: frozenset[str] = frozenset()


class Form:
    """The nodes of one side of a cut, with copies of the layers and tensors that they use.

    ``given``: what a border is given is this function of the value; ``wanted``: what counts of an output is this function
    of it. ``is_modal`` tells, once it has run, whether anything in it asked if it is in training.
    """

    def __init__(
        self,
        world: World,
        nodes: Sequence[Node],
        border: Sequence[Node],
        outputs: Sequence[Node],
        given: Mapping[Node, Relation] | None = None,
        wanted: Mapping[Node, Relation] | None = None,
    ) -> None:
        self.given = given or {}
        self.wanted = wanted or {}
        self.world = world
        self.nodes = nodes
        self.border = border
        self.outputs = outputs
        self.last_use = _last_uses(nodes, outputs)
        self.is_modal = False

    @classmethod
    def of(
        cls, world: World, nodes: Sequence[Node], border: Sequence[Node], outputs: Sequence[tuple[Node, Node]], side: int = 1
    ) -> Form:
        """The form whose outputs are the new nodes of some pairs, or the old ones for ``side`` 0."""
        return cls(world, nodes, border, [pair[side] for pair in outputs])

    @classmethod
    def both(cls, worlds: tuple[World, World], cut: Cut) -> tuple[Form, Form]:
        """Both forms of a cut as functions of the old border that give the new outputs."""
        given = {new: cut.related[new] for _, new in cut.border if new in cut.related}
        wanted = {old: cut.related[new] for old, new in cut.outputs if new in cut.related}
        old = cls(worlds[0], cut.old, cut.old_border, [old for old, _ in cut.outputs], wanted=wanted)
        return old, cls(worlds[1], cut.new, cut.new_border, [new for _, new in cut.outputs], given=given)

    def run(self, values: Sequence[torch.Tensor], setting: Setting) -> Outcome:
        """One forward, and if asked for one backward, of the form on border values; the program is left as it is."""
        tensors = TensorsOf(self.world, self.nodes, setting)
        inputs = [given_to(value, setting) for value in values]
        handed = [leaf(value, setting) for value in inputs]
        draws = SeededDraws(setting.seed + setting.draw)
        with ExitStack() as stack:
            for context in contexts(setting, handed):
                stack.enter_context(context)
            stack.enter_context(draws)
            readers = stack.enter_context(mode_readers())
            for _ in range(setting.calls - 1):
                self.execute([value.detach() for value in handed], tensors, setting)
            found = self.execute(handed, tensors, setting)
            self.is_modal = self.is_modal or bool(readers)
            gradients = _gradients(found, handed, tensors.leaves, setting) if setting.gradients else {}
        return Outcome(
            [t.detach() for t in found],
            [t.requires_grad for t in found],
            gradients,
            tensors.state(),
            {name: (made, value.detach()) for name, (made, value) in tensors.followed.items()},
            [t.detach() for t in handed],
            draws.count,
            tuple(draws.drawn),
            [any(_share(t, v) for v in handed) for t in found],
            frozenset(tensors.sources),
        )

    def layers(self) -> Iterator[tuple[Node, nn.Module]]:
        """The calls of layers among the nodes."""
        for node in self.nodes:
            if node.op == "call_module":
                yield node, attribute(self.world.module, str(node.target))

    def execute(self, values: Sequence[torch.Tensor], tensors: TensorsOf, setting: Setting) -> list[torch.Tensor]:
        """The output tensors, node by node."""
        given = (_related(self.given.get(n), value) for n, value in zip(self.border, values, strict=True))
        env: dict[Node, Any] = dict(zip(self.border, given, strict=True))
        for node in self.nodes:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if node.op == "get_attr":
                env[node] = tensors.fetch(str(node.target))
            elif node.op == "call_module":
                env[node] = tensors.layer(str(node.target))(*args, **kwargs)
            elif node.op == "call_function":
                assert callable(node.target)
                env[node] = node.target(*args, **kwargs)
            else:
                raise KeyError(f"{node.name} is an input that the two programs do not share")
            for dead in self.last_use.get(node, ()):
                env.pop(dead, None)
        ends = (_related(self.wanted.get(n), env[n]) for n in self.outputs)
        return [t for end in ends for t in pytree.tree_leaves(end) if isinstance(t, torch.Tensor)]


def _related(relation: Relation | None, value: Any) -> Any:
    """The value, or what a relation makes of it: in float64, rounded once."""
    return value if relation is None else relation(value.double()).to(value.dtype)


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _gradients(
    outputs: Sequence[torch.Tensor], border: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor], setting: Setting
) -> dict[str, torch.Tensor | None]:
    """Vector-Jacobian products of a fixed projection of the outputs, by the place of a border or a parameter's name."""
    sources = {f"border {i}": t for i, t in enumerate(border) if t.requires_grad}
    sources.update({name: t for name, t in leaves.items() if t.requires_grad})
    loss: Any = 0.0
    for i, output in enumerate(outputs):
        if output.requires_grad:
            real = torch.view_as_real(output) if output.is_complex() else output
            loss = loss + (real * projection(real, setting.seed + i)).sum()
    if not isinstance(loss, torch.Tensor) or not sources:
        return dict.fromkeys(sources)
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    return dict(zip(sources, found, strict=True))


def _last_uses(nodes: Sequence[Node], outputs: Sequence[Node]) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    dead: dict[Node, list[Node]] = {}
    for source, user in last.items():
        if source not in outputs:
            dead.setdefault(user, []).append(source)
    return dead
