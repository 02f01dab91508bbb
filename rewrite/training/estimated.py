"""Linear layers that estimate their weight's gradient from something smaller than their input: what these have in common.

Their operators take x [..., in], weight, bias, y = x Wᵀ + b (x W + b if transposed, the last argument), computed without
gradient, and what is kept of x. They give a copy of y; dx = dy W and db = Σ dy are exact, dW is the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like

_Y = 3
"""The place of y among an operator's arguments."""


class Estimated:
    """A linear layer with the forward of its ``kind``, bit for bit, whose operator is told what ``kept`` makes of x."""

    kind: type[nn.Module]
    own: ClassVar[tuple[str, ...]]
    """What the layer has beside what its kind has: attributes and buffers."""

    def kept(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What the operator is given for the backward."""
        raise NotImplementedError

    def estimated(self, *given: Any) -> torch.Tensor:
        """The operator."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        y: torch.Tensor
        if not (torch.is_grad_enabled() and layer.weight.requires_grad):
            y = self.kind.forward(layer, x)
            return y
        with torch.no_grad():
            y = self.kind.forward(layer, x)
            kept = self.kept(x)
        return self.estimated(x, layer.weight, layer.bias, y, *kept, self.kind is TransposedLinear)

    def plain(self) -> nn.Module:
        """The linear layer, whose forward this is."""
        layer: Any = self
        made = like(layer, self.kind)
        for name in self.own:
            made.__dict__.pop(name, None)
            made._buffers.pop(name, None)
        return made


def copies(operator: Any) -> None:
    """Tell an operator's result without running it: like y."""
    operator.register_fake(lambda *given: torch.empty_like(given[_Y]))


def estimates(operator: Any, weight_gradient: Callable[..., torch.Tensor]) -> None:
    """Give an operator its gradients: ``weight_gradient(dy, *kept)`` is dW [out, in], of dy [rows, out] and what is kept."""

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, *told, ctx.transposed = inputs
        ctx.dtype, ctx.has_bias, ctx.count = x.dtype, bias is not None, len(inputs)
        tensors = [each for each in told if isinstance(each, torch.Tensor)]
        ctx.others = [each for each in told if not isinstance(each, torch.Tensor)]
        ctx.save_for_backward(weight, *tensors)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, *tensors = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:_Y]
        dx = input_gradient(grad, weight, ctx.transposed).to(ctx.dtype) if wants_x else None
        dw = None
        if wants_weight:
            dw = weight_gradient(rows(grad), *tensors, *ctx.others)
            dw = (dw.t() if ctx.transposed else dw).to(weight.dtype)
        db = rows(grad).sum(0) if ctx.has_bias and wants_bias else None
        return dx, dw, db, *[None] * (ctx.count - _Y)

    copies(operator)
    operator.register_autograd(backward, setup_context=keep)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., n] as a matrix."""
    return tensor.reshape(-1, tensor.shape[-1])


def input_gradient(grad: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """dy W, or dy Wᵀ for a transposed layer."""
    used = weight.to(grad.dtype)
    return grad @ (used.t() if transposed else used)


def linear_gradient(layers: Mapping[str, nn.Module], x: torch.Tensor, dy: torch.Tensor) -> Any:
    """Of the one linear layer: dx = dy W, and by name dW = dyᵀ x and db = Σ dy."""
    ((path, layer),) = layers.items()
    made: Any = layer
    is_transposed = isinstance(layer, TransposedLinear)
    weight = made.weight.detach().t() if is_transposed else made.weight.detach()
    dw = rows(dy).t() @ rows(x)
    found = {f"{path}.weight": dw.t() if is_transposed else dw}
    if made.bias is not None:
        found[f"{path}.bias"] = rows(dy).sum(0)
    return [dy @ weight], found
