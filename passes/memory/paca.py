"""Linear layers of which a few input columns train; only these columns of the input are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rewrite.axes.layers import layer_rule, rule_of
from rewrite.graph.layers import TransposedLinear
from rewrite.graph.like import like
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, SAME, Contract
from rewrite.training.column_linear import column_linear
from rewrite.training.lone_linears import LinearSite, lone_linears

if TYPE_CHECKING:
    from rewrite.axes.call import Axes, Call
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class _Partial:
    """y = x Wᵀ + b with trained ``columns`` [out, r] of W at the inputs ``places`` [r]; ``weight`` and bias are frozen."""

    kind: type[nn.Module]

    def merged(self) -> torch.Tensor:
        """The weight with the trained columns in their places."""
        layer: Any = self
        return _merged(layer.weight, layer.columns, places=layer.places, axis=0 if self.kind is TransposedLinear else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        if not (torch.is_grad_enabled() and (layer.columns.requires_grad or x.requires_grad)):
            return self._product(x)
        with torch.no_grad():
            y = self._product(x)
        kept = x.detach()[..., layer.places]
        found: torch.Tensor = column_linear(
            x, layer.weight, layer.columns, y, kept, layer.places, self.kind is TransposedLinear
        )
        return found

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        found: torch.Tensor = (
            layer.product(x, self.merged())
            if self.kind is TransposedLinear
            else nn.functional.linear(x, self.merged(), layer.bias)
        )
        return found

    def plain(self) -> nn.Module:
        """The linear layer, whose forward this is."""
        made = self.bare()
        assert isinstance(made, self.kind)
        layer: Any = self
        made.register_parameter("weight", nn.Parameter(self.merged().detach(), layer.weight.requires_grad))
        return made

    def bare(self) -> nn.Module:
        """The linear layer with the frozen weight."""
        layer: Any = self
        made = like(layer, self.kind)
        del made._parameters["columns"], made._buffers["places"]
        return made


def _taken(weight: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """The columns [out, r] of a weight whose inputs lie along ``axis``."""
    found = weight.index_select(axis, places.to(weight.device))
    return found.t().contiguous() if axis == 0 else found


def _merged(weight: torch.Tensor, columns: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    """The weight with other columns [out, r] at some inputs."""
    columns = columns.to(weight.dtype)
    return weight.index_copy(axis, places.to(weight.device), columns.t() if axis == 0 else columns)


class PaCALinear(_Partial, nn.Linear):
    """A linear layer of which some input columns train."""

    kind = nn.Linear


class PaCATransposedLinear(_Partial, TransposedLinear):
    """The same for y = x W + b."""

    kind = TransposedLinear


KINDS: tuple[type[nn.Module], ...] = (PaCALinear, PaCATransposedLinear)
_HELD = "paca trains some of its inputs, by number (merge-paca puts them back)"


@layer_rule(*KINDS)
def _columns_follow(call: Call, layer: Any, path: str) -> Axes:
    """The columns have the weight's outputs; its inputs keep their numbers."""
    inherited = rule_of(layer, besides=_columns_follow)
    assert inherited is not None
    found: Axes = inherited(call, layer, path)
    call.unify(found[-1], call.notes.axes_of(layer.columns)[0])
    call.role(layer.columns, 0, "out")
    call.freeze(call.axes(call.node.args[0])[-1:], _HELD)
    return found


@dataclass(frozen=True)
class PaCA(Pass):
    """Train ``rank`` random input columns of linear layers: dW[:, idx] = dyᵀ x[..., idx]; weight and bias are frozen.

    Of the input only these columns are kept. The trained parameter is ``columns`` [out, rank], which begins as the weight's
    own columns at ``places``: the function is the same. A layer with no more than ``rank`` inputs is left alone, as is one
    whose weight is shared, that is called twice, or of which another layer keeps the input. What else the model has trains
    as it did: freeze it with ``requires_grad_(False)``. ``merge-paca`` puts the columns back into the weight.

    Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025
    (arXiv 2503.01905).
    """

    name = "paca"
    inserts = KINDS
    rank: int = option(64, "columns of a weight that train", at_least=1, at_most=2**20)
    seed: int = option(0, "which columns are drawn")
    where: Selector = option(Selector("*"), "linear layers: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for site in context.choose(lone_linears(program, KINDS), self.where):
            places = torch.randperm(site.layer.in_features, generator=generator)[: self.rank].sort().values
            small = site.layer.in_features <= self.rank
            if site.obstacle or small:
                context.skip(site.path, site.obstacle or f"it has no more than {self.rank} inputs")
            else:
                axis = 0 if isinstance(site.layer, TransposedLinear) else 1
                context.edit.replace_layer(site.path, _partial(site, places, axis))
                take = functools.partial(_taken, places=places, axis=axis)
                context.edit.set_parameter(f"{site.path}.columns", take, f"{site.path}.weight")


def _partial(site: LinearSite, places: torch.Tensor, axis: int) -> nn.Module:
    layer = site.layer
    weight = layer.weight.detach()
    columns = nn.Parameter(_taken(weight, places, axis).clone())
    frozen: dict[str, Any] = {"weight": nn.Parameter(weight.clone(), False)}
    if layer.bias is not None:
        frozen["bias"] = nn.Parameter(layer.bias.detach().clone(), False)
    kind = PaCATransposedLinear if axis == 0 else PaCALinear
    return like(layer, kind, **frozen, columns=columns, places=places.to(weight.device))


@dataclass(frozen=True)
class MergePaCA(Pass):
    """Put the columns that ``paca`` trained back into the weight: W[:, idx] = columns.

    The layer is an ordinary one again; its weight and bias are frozen, as ``paca`` left them.

    Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025
    (arXiv 2503.01905).
    """

    name = "merge-paca"
    where: Selector = option(Selector("*"), "layers of paca: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        found = {
            str(node.target): LinearSite(str(node.target), (type(layer).__name__,), layer)
            for node, layer in program.layers()
            if isinstance(layer, KINDS)
        }
        for site in context.choose(found.values(), self.where):
            axis = 0 if isinstance(site.layer, TransposedLinear) else 1
            merge = functools.partial(_merged, places=site.layer.places.clone(), axis=axis)
            context.edit.replace_layer(site.path, site.layer.bare())
            weight = f"{site.path}.weight"
            context.edit.set_parameter(weight, merge, weight, f"{site.path}.columns")
