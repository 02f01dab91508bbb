"""Models without norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from rewrite.analysis.norms import norms
from rewrite.analysis.pointwise import AffineLayer, place_of
from rewrite.analysis.sites import Site, sites
from rewrite.graph.spelled import SpelledActivation
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.replacing import Replacing
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, Contract

from .fold_affine import FoldAffine

if TYPE_CHECKING:
    from rewrite.analysis.norms import Norm
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Affine(AffineLayer):
    """y = weight * x + bias: what is left of a norm; x itself where both are None."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.affine(x)


@dataclass(frozen=True)
class NormFree(Pass):
    """Take LayerNorms and RMSNorms out: weight * n(x) + bias becomes weight * x + bias.

    In steps: weight and bias are folded into the linear layers that read the norm, where they can be (`fold-affine`, the
    same function); then the norm goes, and where it could not be folded its weight and bias stay. Another
    function, which hardly trains from a norm's learning rate. Without norms ReLU does better than GELU:
    ``activation=relu`` puts it in place of every GELU. BatchNorm is for `fold-batchnorm`.

    Source: He and Hofmann, "Simplifying Transformer Blocks", ICLR 2024 (arXiv 2311.01906); ReLU: Jha and Reagen, "ReLU's
    Revival: On the Entropic Overload in Normalization-Free Large Language Models" (arXiv 2410.09637).
    """

    name = "norm-free"
    inserts = (Affine,)
    absence = "no layer of it is a LayerNorm or RMSNorm"
    activation: Literal["keep", "relu"] = option("keep", "relu: ReLU in place of every GELU")
    where: Selector = option(Selector("*"), "norms to take out: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=NEW, backward=NEW)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        found = norms(program)
        chosen = [n for n in found if self.where.matches(n.path, n.types)]
        folded = any(n.weight is not None or n.bias is not None for n in chosen)
        relu = self.activation == "relu" and chosen and _gelus(program)
        steps: list[Pass] = [FoldAffine(where=self.where)] if folded else []
        steps += [_WithoutNorms(where=self.where)] if found else []
        return [*steps, *([_Relu()] if relu else [])]


@dataclass(frozen=True)
class _WithoutNorms(Replacing):
    """What is left of norms without the norm."""

    name = "without-norms"

    def places(self, program: Program) -> Sequence[Norm]:
        return norms(program)

    def layer_for(self, place: Norm) -> nn.Module:
        return Affine(place.weight, place.bias, *place_of(place))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """weight * x + bias, channels moved to the end and back."""
        assert isinstance(new, Affine)
        y = inputs[0].movedim(new.channel_axis, -1)
        y = y if new.weight is None else new.weight * y
        y = y if new.bias is None else new.bias + y
        return y.movedim(-1, new.channel_axis)


@dataclass(frozen=True)
class _Relu(Replacing):
    """ReLU in place of GELU."""

    name = "relu-for-gelu"

    def places(self, program: Program) -> Sequence[Site]:
        return _gelus(program)

    def layer_for(self, place: Site) -> nn.Module:
        return nn.ReLU()

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """x where it is above 0, else 0."""
        return torch.where(inputs[0] > 0, inputs[0], 0 * inputs[0])


def _gelus(program: Program) -> list[Site]:
    found = sites(program, nn.GELU, SpelledActivation)
    return [s for s in found if isinstance(s.layer, nn.GELU) or "gelu" in s.layer.function.lower()]
