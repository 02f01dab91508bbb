"""LayerNorm in place of RMSNorm and of what stands in place of norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.norms import Norm, norm_of
from rewrite.analysis.pointwise import AffineLayer
from rewrite.analysis.sites import site_of
from rewrite.analysis.streams import Stream, streams_of
from rewrite.analysis.uses import Uses
from rewrite.analysis.writers import named
from rewrite.graph.like import like
from rewrite.pipeline.centered import CENTERED, Center, CenteredDropout
from rewrite.pipeline.centering import is_read
from rewrite.pipeline.norm_formulas import norm_formula
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_PLAIN = {centered: plain for plain, centered in CENTERED.items()}


class Place(NamedTuple):
    """A layer that a LayerNorm may stand for; ``norm`` is None for what is no norm itself."""

    node: Node
    path: str
    types: tuple[str, ...]
    layer: Any
    norm: Norm | None


@dataclass(frozen=True)
class LayerNorm(Pass):
    """Replace RMSNorm with LayerNorm: RMSNorm(x) = LN(x) where x has no mean, with weight, bias and eps kept.

    ``mode=exact`` does so where the layers that write to the stream take the mean out at every call, as
    `rmsnorm{centering=keep}` leaves them: the function and the gradients of all parameters are the same. Where every norm
    that reads the stream is a LayerNorm then, these layers become plain ones again. ``mode=swap`` puts a LayerNorm in place
    of every RMSNorm, DyT, Derf, ELN and ScaleNorm: another function, though nearly the same where the weights were centered
    once (`rmsnorm{centering=bake}`): that what is trained stays centered is not in the model, so no proof can hold it.

    Left alone, with the reason: norms over another axis than the last; with ``mode=exact`` functions that are no norm, and
    norms of streams that something writes to with a mean.

    Source: Ba et al., "Layer Normalization" (arXiv 1607.06450); that both are one on centered streams: Jiang et al.,
    "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023 (arXiv 2305.14858), section 3.
    """

    name = "layernorm"
    absence = "no layer of it is an RMSNorm, or stands in the place of a norm"
    mode: Literal["exact", "swap"] = option("exact", "exact: where the function stays the same; swap: the plain replacement")
    where: Selector = option(Selector("*"), "layers to replace: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        promise = SAME if self.mode == "exact" else NEW
        return Contract(forward=promise, backward=promise)

    def run(self, program: Program, context: Context) -> None:
        ready = []
        for place in context.choose(_places(program), self.where):
            reason = _obstacle(place, self.mode == "exact")
            if reason:
                context.skip(place.path, reason)
            else:
                ready.append(place)
        if self.mode == "exact":
            ready = _on_centered_streams(ready, program, context)
        for place in {p.path: p for p in ready}.values():
            context.edit.replace_layer(place.path, _layer(place))
        context.edit.sweep()

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The norm, written out."""
        return norm_formula(new, inputs[0])


def _places(program: Program) -> list[Place]:
    found = []
    for node, layer in program.layers():
        norm = norm_of(program, node)
        if norm is not None and norm.kind == "rms":
            found.append(Place(node, norm.path, norm.types, layer, norm))
        elif isinstance(layer, AffineLayer):
            site = site_of(node, layer)
            found.append(Place(node, site.path, site.types, layer, None))
    return found


def _obstacle(place: Place, exact: bool) -> str:
    """Why a layer stays, whatever the stream is; empty if nothing stands in the way."""
    axis = place.layer.channel_axis if place.norm is None else place.norm.channel_axis
    if axis != -1:
        return "its channels are not the last axis"
    if exact and place.norm is None:
        return f"a {type(place.layer).__name__} is another function; mode=swap puts a LayerNorm in its place all the same"
    if exact and place.norm is not None and (place.norm.offset or place.norm.eps is None):
        return "its gain has an offset, or it has no eps of its own, which a LayerNorm does not know"
    return ""


def _layer(place: Place) -> nn.LayerNorm:
    old: Any = place.layer if place.norm is None else place.norm
    shape = old.normalized_shape if place.norm is None else old.shape
    made: Any = nn.LayerNorm(shape, 1e-5 if old.eps is None else old.eps, elementwise_affine=False)
    made.weight, made.bias, made.elementwise_affine = old.weight, old.bias, old.weight is not None
    found: nn.LayerNorm = made
    return found


def _on_centered_streams(places: Sequence[Place], program: Program, context: Context) -> list[Place]:
    """Those whose stream has no mean; where only LayerNorms read it then, the layers that center it become plain."""
    uses, ready = Uses(program), []
    streams = streams_of(program, [(place.node.all_input_nodes[0], -1) for place in places])
    reasons = {id(stream): _mean(stream, uses) for stream in streams}
    for place, stream in zip(places, streams, strict=True):
        if reasons[id(stream)]:
            context.skip(place.path, reasons[id(stream)])
        else:
            ready.append(place)
    nodes = {place.node for place in ready}
    kept = {id(s): s for s in streams if not reasons[id(s)]}
    nodes |= {r.node for s in streams for r in s.readers if isinstance(uses.layer(r.node), Center)}
    plain = [s for s in kept.values() if all(_ignores_mean(r.node, nodes, program) for r in s.readers)]
    for stream in kept.values():
        context.edit.move(list(stream.values), "what reads them takes their mean for 0, or out")
    _uncenter(plain, uses, context)
    return ready


def _mean(stream: Stream, uses: Uses) -> str:
    """What gives a stream a mean; empty if nothing does."""
    stops = [n for n in stream.values if isinstance(uses.layer(n), CenteredDropout)]
    centers = [r.node for r in stream.readers if isinstance(uses.layer(r.node), Center)]
    if stream.torn:
        return f"{named(stream.torn)} is reached along two axes"
    for writer in (*stream.writers, *stream.offsets):
        if isinstance(uses.layer(writer), (Center, *_PLAIN)):
            continue
        if is_read(writer, stream, stops, centers):
            return f"{named(writer)} writes to the stream with a mean; mode=swap replaces it all the same"
    return ""


def _ignores_mean(node: Node, chosen: set[Node], program: Program) -> bool:
    norm = norm_of(program, node)
    return node in chosen or (norm is not None and norm.kind == "layer")


def _uncenter(streams: Sequence[Stream], uses: Uses, context: Context) -> None:
    """Let the layers that center streams be plain ones, where all their calls are of these streams."""
    values = {node for stream in streams for node in stream.values}
    layers: Mapping[str, nn.Module | None] = {str(n.target): uses.layer(n) for n in values if n.op == "call_module"}
    for path, layer in sorted(layers.items()):
        calls = uses.calls(path)
        if layer is None or not values.issuperset(calls):
            continue
        if type(layer) in _PLAIN:
            context.edit.replace_layer(path, like(layer, _PLAIN[type(layer)]))
        for node in calls if isinstance(layer, Center) else ():
            context.edit.rewire(node, node.all_input_nodes[0])
            context.edit.remove(node)
