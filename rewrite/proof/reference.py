"""A part computed from the formula that its pass gives, in the same settings as the part itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from rewrite.torch_private import pytree

from .contract import Promising
from .cuts import Cut
from .form import Form, Setting, TensorsOf, World
from .part import Part


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
        with barred(part.new.values()):
            found = self.step.formula(part, *self._ordered(values))
        return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]

    def _ordered(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The border values in the order of the arguments where the part is one call, else in that of the graph."""
        calls = [n for n in self.cut.new if n.op == "call_module"]
        given = dict(zip(self.border, values, strict=True))
        if len(calls) == 1 and set(given) <= set(calls[0].all_input_nodes):
            return [given[n] for n in calls[0].all_input_nodes if n in given]
        return list(values)


@contextmanager
def barred(layers: Iterator[nn.Module] | Any) -> Iterator[None]:
    """Within the context, the ``forward`` of these layers' classes raises, torch's own layers left aside."""
    classes = {type(part) for layer in layers for part in layer.modules() if not _is_torch(type(part))}
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
