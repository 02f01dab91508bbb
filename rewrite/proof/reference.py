"""A part computed from the formula that its pass gives, in the same settings as the part itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from rewrite.graph.nodes import attribute
from rewrite.graph.regions import Region
from rewrite.numerics.compare import same_bytes
from rewrite.torch_private import pytree

from .contract import NoFormulaError, Promising
from .cuts import Cut
from .form import Form
from .part import Part
from .setting import Setting
from .tensors import TensorsOf, World


class ReferenceForm(Form):
    """The new form of a cut as ``step.formula`` says it: same border, same leaves, but no layer of the pass is called."""

    def __init__(self, worlds: tuple[World, World], cut: Cut, step: Promising) -> None:
        super().__init__(worlds[1], cut.new, [new for _, new in cut.border], [new for _, new in cut.outputs])
        self.before = worlds[0]
        self.cut = cut
        self.step = step

    def execute(self, values: Sequence[torch.Tensor], tensors: TensorsOf, setting: Setting) -> list[torch.Tensor]:
        """The outputs by the formula."""
        old = TensorsOf(self.before, self.cut.old, setting, leaves=tensors.leaves)
        part = Part(old.called(self.cut.old), tensors.called(self.cut.new))
        try:
            with barred(part.new.values(), part.old.values()):
                found = self.step.formula(part, *self._ordered(values))
        except NoFormulaError:
            if not self._is_told_by_layers(part):
                raise
            self._put_formulas(part, tensors)
            return super().execute(values, tensors, setting)
        return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]

    def _is_told_by_layers(self, part: Part) -> bool:
        """Whether the part differs from what it was in layers alone: beside what writes in place no value can be held, so
        that it has others in it, which are as they were.
        """
        there = {(n.name, n.target) for n in self.cut.old if n.op == "call_function"}
        functions = {(n.name, n.target) for n in self.cut.new if n.op == "call_function"}
        return functions <= there and part.old.keys() <= part.new.keys()

    def _put_formulas(self, part: Part, tensors: TensorsOf) -> None:
        """Let each new layer among the part's be computed by the pass's formula for it alone."""
        for path, layer in part.new.items():
            old = part.old.get(path)
            if not isinstance(layer, _Formula) and not self._is_as_it_was(path):
                tensors.layers[path] = _Formula(self.step, Part({} if old is None else {path: old}, {path: layer}), layer)

    def _is_as_it_was(self, path: str) -> bool:
        """Whether a layer is of the class, with the plain attributes and the tensors, that it had before the pass."""
        old, new = attribute(self.before.module, path), attribute(self.world.module, path)
        if type(old) is not type(new) or _plain(old) != _plain(new):
            return False
        before, after = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (old, new))
        return before.keys() == after.keys() and all(same_bytes(before[name], after[name]) for name in before)

    def _ordered(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The border values in the order of the arguments where the part is one call, else in that of the graph."""
        calls = [n for n in self.cut.new if n.op == "call_module"]
        given = dict(zip(self.border, values, strict=True))
        if len(calls) == 1 and set(given) <= set(calls[0].all_input_nodes):
            return [given[n] for n in calls[0].all_input_nodes if n in given]
        return list(values)


def _plain(layer: nn.Module) -> list[tuple[type[nn.Module], dict[str, str]]]:
    """What a layer and its children are, and their attributes that are not torch's own, as text."""
    bare = vars(nn.Module())
    return [(type(part), {k: repr(v) for k, v in vars(part).items() if k not in bare}) for part in layer.modules()]


class StandIn(nn.Module):
    """Stands where a new layer of a part does; neither the part nor the layer is a child of it."""

    step: Promising
    part: Part
    layer: nn.Module

    def __init__(self, step: Promising, part: Part, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(step=step, part=part, layer=layer)


class _Formula(StandIn):
    """Computes what the pass says that ``layer`` computes."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        with barred([self.layer], self.part.old.values()):
            return self.step.formula(self.part, *inputs)


@contextmanager
def barred(layers: Collection[nn.Module], old: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Within the context, the ``forward`` of these layers' classes raises, torch's own layers left aside, and within them
    those that the ``old`` layers are made of, which an earlier pass may have put there, and those that hold a graph.
    """
    known = {type(part) for layer in old for part in layer.modules()}
    inside = {type(part) for layer in layers for part in layer.modules()} - known - {Region}
    classes = {kind for kind in inside | {type(layer) for layer in layers} if not _is_torch(kind)}
    with ExitStack() as stack:
        for kind in classes:
            stack.enter_context(mock.patch.object(kind, "forward", _refusing(kind)))
        yield


def _is_torch(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith("torch.nn.")


def _refusing(kind: type[nn.Module]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"the formula calls {kind.__qualname__}, the layer that it is to judge")

    return forward
