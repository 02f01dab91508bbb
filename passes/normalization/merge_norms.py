"""Folding norms without a reduction into the linear layers that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewrite.analysis.running_norm import RunningNorm
from rewrite.analysis.sites import Site, sites
from rewrite.pipeline.folding import NormReaders, fold_gain, fold_shift, fold_statistics
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.edit import Editor
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class MergeNorms(Pass):
    """Fold norms by running statistics into the linear layers that read them: W (a ∘ x + b) + c = (W diag(a)) x + (c + W b).

    What `power-norm`, `unified-norm` and `rep-batchnorm` put in is an affine map of the channels in evaluation; it goes
    into weights and biases, and the norm is gone. Evaluation stays the same; training no longer takes statistics, so it is
    for a model that is trained.

    Left alone, with the reason: norms that something else reads than linear layers of their own, whose shift finds no
    bias, that are called more than once, and `rep-batchnorm` before the end of its schedule.

    Source: the papers of these passes; Guo et al. (arXiv 2405.11582), equation 6, for the merge of a RepBN.
    """

    name = "merge-norms"
    absence = "no norm of it is by running statistics: power-norm, unified-norm and rep-batchnorm put them in"
    where: Selector = option(Selector("*"), "norms to fold: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME, evaluation_only=True)

    def run(self, program: Program, context: Context) -> None:
        found = NormReaders(program)
        chosen = context.choose(sites(program, RunningNorm), self.where)
        fold_statistics(chosen, lambda site: _obstacle(site, found) or _merge(site, found, context.edit), context)


def _obstacle(site: Site, found: NormReaders) -> str:
    if site.layer.unsettled():
        return str(site.layer.unsettled())
    if len(found.uses.calls(site.path)) > 1:
        return "it is called more than once"
    return found.obstacle(site.node, shifted=_Shift.of(site.layer) is not None)


def _merge(site: Site, found: NormReaders, edit: Editor) -> str:
    layer: RunningNorm = site.layer
    linears, names = found.linears(site.node), [f"{site.path}.{name}" for name in layer.sources()]
    shift = _Shift.of(layer)
    if shift is not None:
        fold_shift(edit, linears, shift, *names)
    fold_gain(edit, linears, _Gain(type(layer), layer.eps), *names)
    return ""


@dataclass(frozen=True)
class _Gain:
    """The gain of a kind of norm, as a function of its tensors."""

    kind: type[RunningNorm]
    eps: float

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.kind.affine_map(self.eps, *tensors)[0]


@dataclass(frozen=True)
class _Shift:
    """The shift of a kind of norm, as a function of its tensors."""

    kind: type[RunningNorm]
    eps: float

    @classmethod
    def of(cls, layer: RunningNorm) -> _Shift | None:
        """That of a layer, None where it has none."""
        tensors = [getattr(layer, name) for name in layer.sources()]
        return cls(type(layer), layer.eps) if layer.affine_map(layer.eps, *tensors)[1] is not None else None

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        found = self.kind.affine_map(self.eps, *tensors)[1]
        assert found is not None
        return found
