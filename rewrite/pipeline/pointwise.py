"""What the passes declare that put an element-wise function in place of norms; it costs nothing to import.

The work is done in ``norm_replacement``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rewrite.proof.contract import NEW, Contract

from .pass_ import Pass, option
from .select import Selector

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rewrite.analysis.calibration import Curve, Fit
    from rewrite.analysis.norms import Norm
    from rewrite.graph.program import Program

    from .context import Context

Calibrate = Literal["none", "lsq", "formula"]
_LARGEST = 1e4


@dataclass(frozen=True)
class Pointwise(Pass):
    """Replace norms by an element-wise function with weight and bias: a base class.

    A method says its ``curve``, by which it is calibrated, the layer (``layer_for``) and its formula (``value``).
    """

    absence = "no layer of it is a LayerNorm or RMSNorm"
    method: ClassVar[str]
    """The name of the method, as its paper writes it."""

    alpha: float = option(0.5, "value of alpha at the start", at_least=-_LARGEST, at_most=_LARGEST)
    alpha_attention: float | None = option(None, "alpha of norms of attention", at_least=-_LARGEST, at_most=_LARGEST)
    alpha_ffn: float | None = option(None, "alpha of norms of FFNs", at_least=-_LARGEST, at_most=_LARGEST)
    alpha_final: float | None = option(None, "alpha of the norm behind the last block", at_least=-_LARGEST, at_most=_LARGEST)
    calibrate: Calibrate = option("none", "fit to what the norms give on data: lsq (least squares), formula, none")
    fallback: float = option(0.2, "calibrated norms with a larger relative error become RMSNorm", at_least=0)
    where: Selector = option(Selector("*"), "norms to replace: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def curve(self) -> Curve:
        """The function that is fitted."""
        raise NotImplementedError

    def layer_for(self, norm: Norm, alpha: float, weight: nn.Parameter | None, bias: nn.Parameter | None) -> nn.Module:
        """The layer in place of a norm; ``alpha`` is the option's."""
        raise NotImplementedError

    def fitted_layer(self, norm: Norm, fit: Fit, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The layer in place of a norm that was calibrated: by default ``alpha`` is the fit's scale."""
        return self.layer_for(norm, fit.scale, weight, bias)

    def value(self, new: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The method's formula f(x) apart from weight and bias, channels last, for ``reference``."""
        raise NotImplementedError

    def run(self, program: Program, context: Context) -> None:
        from .norm_replacement import replace_norms

        replace_norms(self, program, context)

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """weight * f(x) + bias, of a fallback the RMSNorm."""
        from .norm_replacement import reference_of

        (x,) = inputs
        return reference_of(self, new, x)
