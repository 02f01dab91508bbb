"""What the passes share that multiply what a branch adds by a trained gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from rewrite.errors import OptionError
from rewrite.graph.nodes import tensor_value
from rewrite.graph.relation import Scaled
from rewrite.proof.contract import NEW, SAME, Contract

from .inserting import insert_behind
from .pass_ import option
from .placing import Placing, Surroundings, into_sum, times

if TYPE_CHECKING:
    from rewrite.analysis.branches import Branch

    from .context import Context

Mode = Literal["exact", "new"]


class Gain(nn.Module):
    """y = scale · x with ``scale`` [C] along the axis that is ``axis`` from the end (-1, the last), or [1]."""

    def __init__(self, scale: torch.Tensor, axis: int = -1) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.reshape(-1, *[1] * (-1 - self.axis))


@dataclass(frozen=True)
class Gating(Placing):
    """Multiply what branches add by a trained gain: a base class."""

    single: ClassVar[bool]
    """Whether the gain is one number, or one for each channel."""
    start: ClassVar[float]
    """Where the method has its gain start; with ``mode=exact`` it starts at 1."""

    mode: Mode = option("exact", "exact: what the gain takes, the weights before it give back; new: the plain gain")
    init: float | None = option(None, "value of the gain at the start: 1, or with mode=new the method's own", finite=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "exact" and self.init == 0:
            raise OptionError(f"option 'init' of pass '{self.name}': a gain of 0 takes all; mode=new allows it", "init")

    def contract(self) -> Contract:
        promise = SAME if self.mode == "exact" else NEW
        return Contract(forward=promise, backward=promise)

    @property
    def value(self) -> float:
        """The gain at the start."""
        standard = 1.0 if self.mode == "exact" else self.start
        return standard if self.init is None else self.init

    def obstacle(self, branch: Branch, around: Surroundings) -> str:
        if branch.scale is not None or isinstance(around.writers.uses.layer(branch.writer), Gain):
            return "what it adds is scaled already"
        if self.mode == "exact" and self.value != 1:
            found = around.tensors(branch)
            return found if isinstance(found, str) else ""
        return ""

    def place(self, branch: Branch, around: Surroundings, context: Context) -> None:
        value = tensor_value(branch.writer)
        assert value is not None
        if self.mode == "exact" and self.value != 1:
            context.edit.move([branch.writer], "the gain behind it gives it back", Scaled(1 / self.value))
            for path in around.tensors(branch):
                context.edit.set_parameter(path, times(1 / self.value), path)
        sizes = 1 if self.single else branch.stream.size
        like = next(around.program.module.parameters(), value)
        scale = torch.full((sizes,), self.value, dtype=value.dtype, device=like.device)
        gain = Gain(scale, -1 if self.single else branch.stream.values[branch.writer] - value.dim())
        target = into_sum(branch)
        insert_behind(context.edit, branch.writer, "gain", gain, users=lambda user: user is target)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The gain times each channel, channels moved to the end and back."""
        assert isinstance(new, Gain)
        rows = inputs[0].movedim(new.axis, -1)
        return torch.einsum("...c,c->...c", rows, new.scale.expand(rows.shape[-1])).movedim(-1, new.axis)
