"""A part of several layers, of which some hand their gradient on as the pass's formula says.

Beside what writes in place no value can be held, so that such a part has more layers than those that the pass replaced: the
others compute their gradient themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .contract import NoFormulaError, Promising
from .cuts import Cut
from .form import Form
from .part import Part
from .reference import StandIn
from .setting import Setting
from .tensors import TensorsOf, World


class LayerwiseForm(Form):
    """The new form of a cut, in which each replaced layer has the gradient that ``step.gradient`` gives for it alone."""

    def __init__(self, worlds: tuple[World, World], cut: Cut, step: Promising) -> None:
        super().__init__(worlds[1], cut.new, cut.new_border, [new for _, new in cut.outputs])
        self.before = worlds[0]
        self.cut = cut
        self.step = step

    @classmethod
    def fits(cls, worlds: tuple[World, World], cut: Cut) -> bool:
        """Whether there is more in the part than one new layer, and each new one stands where an old one stood."""
        old, new = (
            Form.of(world, nodes, (), (), side)
            for side, (world, nodes) in enumerate(zip(worlds, (cut.old, cut.new), strict=True))
        )
        before = {str(node.target): type(layer) for node, layer in old.layers()}
        after = {str(node.target): type(layer) for node, layer in new.layers()}
        return len([n for n in cut.new if n.op != "get_attr"]) > 1 and before.keys() == after.keys() and before != after

    def execute(self, values: Sequence[torch.Tensor], tensors: TensorsOf, setting: Setting) -> list[torch.Tensor]:
        """The outputs, their gradient by the formula where a layer is new."""
        olds = TensorsOf(self.before, self.cut.old, setting, leaves=tensors.leaves).called(self.cut.old)
        for path, layer in tensors.called(self.cut.new).items():
            if type(olds[path]) is not type(layer):
                tensors.layers[path] = _Told(self.step, Part({path: olds[path]}, {path: layer}), layer)
        return super().execute(values, tensors, setting)


class _Told(StandIn):
    """Computes what ``layer`` does, with the gradient that the pass says."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        return _ByFormula.apply(self, *inputs)


class _ByFormula(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, told: _Told, *inputs: torch.Tensor) -> Any:
        ctx.told = told
        ctx.save_for_backward(*inputs)
        return told.layer(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        found = ctx.told.step.gradient(ctx.told.part, ctx.saved_tensors, grads)
        if isinstance(found, tuple) and found and isinstance(found[-1], Mapping):
            raise NoFormulaError("a new layer with parameters stands beside what writes in place: its gradient is not held")
        return None, *found
