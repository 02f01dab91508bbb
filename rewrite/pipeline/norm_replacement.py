"""Element-wise functions in place of norms: which become what, fitted to data or not, and which stay norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from rewrite.analysis.calibration import Fit, calibrated
from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.pointwise import PointwiseLayer, parameter
from rewrite.analysis.residuals import post_norms
from rewrite.analysis.roles import Role, roles
from rewrite.analysis.unseen import unseen_text
from rewrite.errors import RewriteError
from rewrite.graph.layers import BiasedRMSNorm

from .norm_formulas import norm_formula

if TYPE_CHECKING:
    from rewrite.graph.program import Program

    from .context import Context
    from .pointwise import Pointwise


def replace_norms(step: Pointwise, program: Program, context: Context) -> None:
    """Put the layers of ``step`` in place of the norms that it chooses; what was measured on data is noted."""
    every = norms(program)
    chosen = {norm.path: norm for norm in context.choose(every, step.where)}
    _warn(step, program, chosen, context)
    known = roles(program)
    fits = _fits(step, program, [norm for norm in every if norm.path in chosen], context)
    for path, norm in chosen.items():
        fit = fits.get(path)
        if fit is None:
            context.edit.replace_layer(path, step.layer_for(norm, _alpha(step, known[norm.node]), norm.weight, norm.bias))
            continue
        layer = _fitted(step, norm, fit)
        kind = norm.layer_name if layer is None else type(layer).__name__
        context.measure(path, role=known[norm.node], scale=fit.scale, error=fit.error, layer=kind)
        if layer is None:
            context.skip(path, f"its error {fit.error:.3f} is above fallback={step.fallback:g}")
        else:
            context.edit.replace_layer(path, layer)


def _warn(step: Pointwise, program: Program, chosen: Mapping[str, Norm], context: Context) -> None:
    posts = dict.fromkeys(norm.path for norm in post_norms(program, norms(program)) if norm.path in chosen)
    if posts:
        context.warn(f"{step.method} is known not to train in place of post-norms, and these are: {', '.join(posts)}")
    if rest := unseen_text(program, "norm"):
        context.warn(rest)


def _alpha(step: Pointwise, role: Role) -> float:
    own = {"attention": step.alpha_attention, "ffn": step.alpha_ffn, "final": step.alpha_final}.get(role)
    return step.alpha if own is None else own


def _fits(step: Pointwise, program: Program, found: list[Norm], context: Context) -> dict[str, Fit]:
    if step.calibrate == "none" or not found:
        return {}
    if context.data is None:
        raise RewriteError(f"{step.name}{{calibrate={step.calibrate}}} needs data: apply(..., data=...) or --data FILE")
    data, progress = context.data, context.progress
    return calibrated(program, found, step.curve(), step.calibrate, data, progress=progress, seed=context.seed)


def _fitted(step: Pointwise, norm: Norm, fit: Fit) -> nn.Module | None:
    """The calibrated layer; an RMSNorm where that is too far from the norm; None where the norm has to stay."""
    if fit.error <= step.fallback:
        bias = None if fit.bias is None else parameter(fit.bias, norm.bias, norm)
        return step.fitted_layer(norm, fit, parameter(fit.weight, norm.weight, norm), bias)
    if norm.kind == "rms" or norm.channel_axis != -1:
        return None
    if norm.bias is not None:
        return BiasedRMSNorm(norm.shape, norm.eps, norm.weight, norm.bias)
    made = nn.RMSNorm(norm.shape, norm.eps, elementwise_affine=False)
    made.weight = norm.weight  # type: ignore[assignment]
    return made


def reference_of(step: Pointwise, new: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """weight * f(x) + bias with f of ``step.value``, channels moved to the end and back; of a fallback, the RMSNorm."""
    if isinstance(new, nn.RMSNorm):
        return norm_formula(new, x)
    assert isinstance(new, PointwiseLayer)
    y = step.value(new, x.movedim(new.channel_axis, -1))
    y = y * new.weight if new.weight is not None else y
    y = y + new.bias if new.bias is not None else y
    return y.movedim(-1, new.channel_axis)
