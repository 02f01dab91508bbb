"""Dynamic tanh (DyT) in place of normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.residuals import post_norms
from rewrite.analysis.unseen import unseen_text
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class DynamicTanh(nn.Module):
    """y = weight * tanh(alpha * x) + bias, element by element; alpha is one trained number.

    ``weight`` and ``bias`` have the norm's ``normalized_shape`` (or are None) and stand along the last axes of x, or
    along ``channel_axis`` 1 of a channels-first map [N, C, ...]. ``eps`` is the replaced norm's, unused, for code that
    reads it.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        alpha: torch.Tensor,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        normalized_shape: tuple[int, ...],
        channel_axis: int = -1,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(alpha)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.normalized_shape = normalized_shape
        self.channel_axis = channel_axis
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.alpha * x)
        if self.weight is not None:
            y = y * self._along(self.weight, x)
        if self.bias is not None:
            y = y + self._along(self.bias, x)
        return y

    def _along(self, parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return parameter if self.channel_axis == -1 else parameter.reshape(-1, *[1] * (x.dim() - 2))

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, channel_axis={self.channel_axis}"


@dataclass(frozen=True)
class DyT(Pass):
    """Replace normalization with dynamic tanh: y = weight * tanh(alpha * x) + bias.

    Every LayerNorm and RMSNorm that ``where`` selects, whatever its spelling, becomes an element-wise function: no
    statistics are taken. The trained weight and bias are carried over; a norm without them gets none. The result is
    another function and has to be trained. It is known not to train in post-norm models, and not in place of BatchNorm.

    Source: Zhu et al., "Transformers without Normalization", CVPR 2025 (arXiv 2503.10622), equation 1. There alpha
    starts at 0.5; for Llama 7B at 0.8 before attention and 0.2 before FFNs and the head: use the pass twice, with
    ``where``.
    """

    name = "dyt"
    inserts = (DynamicTanh,)
    alpha: float = option(0.5, "value of the trained scalar alpha at the start", at_least=-1e4, at_most=1e4)
    where: Selector = option(Selector("*"), "norms to replace: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        chosen = {norm.path: norm for norm in context.choose(norms(program), self.where)}
        posts = [norm.path for norm in post_norms(program, norms(program)) if norm.path in chosen]
        if posts:
            context.warn(f"DyT is known not to train in place of post-norms, and these are: {', '.join(posts)}")
        if rest := unseen_text(program, "norm"):
            context.warn(rest)
        for path, norm in chosen.items():
            context.edit.replace_layer(path, self.layer_for(norm))

    def layer_for(self, norm: Norm) -> DynamicTanh:
        """The layer that replaces a norm, with its trained weight and bias."""
        like = norm.value
        alpha = torch.full((1,), self.alpha, dtype=like.dtype, device=norm.device)
        return DynamicTanh(alpha, norm.weight, norm.bias, norm.shape, norm.channel_axis, norm.eps)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """weight * (1 - e^(-2u)) / (1 + e^(-2u)) + bias with u = alpha x (odd in u), channels moved to the end and back."""
        assert isinstance(new, DynamicTanh)
        (x,) = inputs
        moved = x.movedim(new.channel_axis, -1)
        u = new.alpha * moved
        y = torch.where(u >= 0, _tanh_from_zero(u), -_tanh_from_zero(-u))
        y = y * new.weight if new.weight is not None else y
        y = y + new.bias if new.bias is not None else y
        return y.movedim(-1, new.channel_axis)


def _tanh_from_zero(u: torch.Tensor) -> torch.Tensor:
    """(1 - e^(-2u)) / (1 + e^(-2u)) for u >= 0, to full precision for the smallest u and without overflow.

    Its derivative at 0 is 1; that of ``clamp`` at its bound is 1 or 0, as torch's version has it.
    """
    less = torch.expm1(-2 * torch.where(u >= 0, u, 0))
    return -less / (less + 2)
