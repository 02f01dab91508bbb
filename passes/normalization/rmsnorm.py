"""LayerNorm to RMSNorm, exactly: the mean taken out of what is written to the stream."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from rewrite.analysis.norms import Norm, norms
from rewrite.analysis.streams import Stream, streams_of
from rewrite.errors import RewriteError
from rewrite.graph.layers import BiasedRMSNorm
from rewrite.graph.nodes import attribute
from rewrite.pipeline.centered import CENTERED, Center
from rewrite.pipeline.centering import Centering
from rewrite.pipeline.compressing import Compressing, CRMSNorm
from rewrite.pipeline.norm_formulas import norm_formula
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


@dataclass(frozen=True)
class RMSNorm(Pass):
    """Replace LayerNorm with RMSNorm: LN(x) = RMSNorm(x - mean x), with weight, bias and eps kept.

    ``mode=exact`` takes the mean out of all that is written to the stream, once and for all: W - mean of its rows, b - mean
    b, E - mean E for output projections, patch and token embeddings, positions and class tokens. LayerScale is folded into
    its projection first; what enters the stream in another way (from a norm behind the embedding) is centered by a layer
    of its own; a tied embedding is untied from the head. The function and the gradients of all old parameters are the same.
    Fine-tuned further, the centered weights drift apart from a LayerNorm model's. ``centering=keep`` leaves the weights as
    they are and uses layers that center them at every call, or what leaves a dropout: training too stays that of the
    LayerNorm model.

    ``compressed=true`` also drops the last unit of the stream, which is minus the sum of the others (Pre-CRMSNorm): writers
    lose a row, a linear layer that reads a norm gets W[:, :-1] - W[:, -1:] with the norm's weight and bias folded in, the
    norm becomes z / √((Σ z² + (Σ z)²) / d + eps). The model's own class does not know the size d - 1.

    Refused, by name, where something reads the stream that is no LayerNorm (post-norm models); with ``centering=bake`` also
    where a dropout stands on the stream in training, and where what a branch writes cannot be centered. ``mode=swap`` just
    puts RMSNorm in LayerNorm's place: another function.

    Source: Jiang et al., "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023 (arXiv 2305.14858), section 3.
    """

    name = "rmsnorm"
    inserts = (BiasedRMSNorm, Center, CRMSNorm, *CENTERED.values())
    absence = "no layer of it is a LayerNorm"
    mode: Literal["exact", "swap"] = option("exact", "exact: the same function; swap: the plain replacement")
    centering: Literal["bake", "keep"] = option("bake", "bake: the weights are centered once; keep: at every call")
    compressed: bool = option(False, "true: the stream without its last unit, which the others tell")
    where: Selector = option(Selector("*"), "norms to replace: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        if self.compressed and (self.mode, self.centering) != ("exact", "bake"):
            raise RewriteError("rmsnorm{compressed=true} needs mode=exact and centering=bake: a unit is told by the others")

    def contract(self) -> Contract:
        promise = SAME if self.mode == "exact" else NEW
        return Contract(forward=promise, backward=promise)

    def run(self, program: Program, context: Context) -> None:
        chosen = context.choose([n for n in norms(program) if n.kind == "layer"], self.where)
        if self.mode == "exact":
            centering = Centering(program, context, Center, CENTERED if self.centering == "keep" else None)
            pairs = _on_ready_streams(chosen, centering, program, context)
            if self.compressed:
                Compressing(program, context, centering).run(pairs)
                return
            for stream in {id(stream): stream for _, stream in pairs}.values():
                centering.center(stream)
            chosen = [norm for norm, _ in pairs]
        for norm in {n.path: n for n in chosen}.values():
            context.edit.replace_layer(norm.path, _rms(norm, program, context))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """x / √(mean x² + eps), times weight, plus bias, written out."""
        return norm_formula(new, inputs[0])


def _on_ready_streams(
    chosen: list[Norm], centering: Centering, program: Program, context: Context
) -> list[tuple[Norm, Stream]]:
    """The norms all of whose calls read streams that can be centered, with those; the others are skipped with the reason."""
    ready = []
    streams = streams_of(program, [(norm.node.all_input_nodes[0], norm.channel_axis) for norm in chosen])
    reasons = {id(stream): centering.obstacle(stream) for stream in streams}
    calls = collections.defaultdict(list)
    for norm, stream in zip(chosen, streams, strict=True):
        calls[norm.path].append(reasons[id(stream)])
    for norm, stream in zip(chosen, streams, strict=True):
        if reason := next(filter(None, calls[norm.path]), ""):
            context.skip(norm.path, reason)
        else:
            ready.append((norm, stream))
    return ready


def _rms(norm: Norm, program: Program, context: Context) -> nn.Module:
    """The layer that replaces a norm, with the norm's own parameters."""
    weight, bias = (_kept(path, f"{norm.path}.{name}", program, context) for path, name in _names(norm))
    if bias is None and norm.channel_axis == -1 and not norm.offset:
        made = nn.RMSNorm(norm.shape, norm.eps, elementwise_affine=False)
        made.weight, made.elementwise_affine = weight, weight is not None  # type: ignore[assignment]
        return made
    return BiasedRMSNorm(norm.shape, norm.eps, weight, bias, norm.channel_axis, norm.offset)


def _names(norm: Norm) -> tuple[tuple[str | None, str], ...]:
    return (norm.weight_path, "weight"), (norm.bias_path, "bias")


def _kept(path: str | None, name: str, program: Program, context: Context) -> nn.Parameter | None:
    """A norm's parameter under torch's name, flat."""
    if path is None:
        return None
    if path != name or attribute(program.module, path).dim() != 1:
        context.edit.set_parameter(name, _flat, path)
    found: nn.Parameter = attribute(program.module, name)
    return found


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)
