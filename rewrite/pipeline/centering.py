"""Taking the mean out of a stream: every value that is written to it is centered along its hidden axis, in the weights.

Only what ignores the mean may read the stream, so the function stays the same.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.branches import Branch, branches
from rewrite.analysis.norms import norm_of
from rewrite.analysis.streams import Reader, Stream
from rewrite.analysis.writers import Writers, Written, averages, named
from rewrite.graph.like import like
from rewrite.graph.nodes import aten, attribute, leaves, packet, tensor_value
from rewrite.graph.relation import Centered
from rewrite.torch_private import _DropoutNd

from .inserting import insert_behind

if TYPE_CHECKING:
    from collections.abc import Callable

    from rewrite.graph.program import Program

    from .context import Context


class Centering:
    """Centers streams of a program.

    ``layer`` makes the layer that centers a value along an axis. ``kinds`` are classes that do what a layer does with its
    weight centered (a dropout's, with what it gives centered) at every call: with these the weights stay as they are, and
    are trained as before. Without them the weights are centered once and for all.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        layer: Callable[[int], nn.Module],
        kinds: Mapping[type[nn.Module], type[nn.Module]] | None = None,
    ) -> None:
        self.program = program
        self.edit = context.edit
        self.warn = context.warn
        self.layer = layer
        self.kinds = kinds
        self.writers = Writers(program)

    def obstacle(self, stream: Stream) -> str:
        """Why a stream cannot be centered; empty if it can."""
        found = branches(self.program, [stream])
        other = next((r for r in stream.readers if not self._ignores_mean(r, stream)), None)
        if other is not None:
            post = "post-norm: " if any(b.stream_norms for b in found) else ""
            return f"{post}{named(other.node)} reads the stream too, and is no LayerNorm that takes its mean out"
        if stream.torn:
            return f"{named(stream.torn)} is reached along two axes"
        return "" if self.kinds is not None else self._baking_obstacle(stream, found)

    def _baking_obstacle(self, stream: Stream, found: Sequence[Branch]) -> str:
        """Why a stream cannot be centered in its weights."""
        if stream.dropouts:
            node, p = stream.dropouts[0]
            return (
                f"{named(node)} drops single units of the stream in training (p={p:g}): "
                "set its rate to 0 first, or use centering=keep"
            )
        if stream.offsets:
            return f"{named(stream.offsets[0])} adds something that cannot be centered; use centering=keep"
        inner = {b.writer for b in found}
        plans = {writer: self.writers.of(stream, writer) for writer in stream.writers}
        reasons = {writer: plan for writer, plan in plans.items() if isinstance(plan, str)}
        if len(reasons) == len(plans):
            return next(iter(reasons.values()))
        return next((reason for writer, reason in reasons.items() if writer in inner), "")

    def _ignores_mean(self, reader: Reader, stream: Stream) -> bool:
        norm = norm_of(self.program, reader.node)
        value = tensor_value(reader.value)
        if norm is None or value is None:
            return _gives_no_data(reader.node)
        return norm.kind == "layer" and norm.shape == (stream.size,) and norm.channel_axis % value.dim() == reader.axis

    def center(self, stream: Stream) -> None:
        """Center all that is written: in tensors where it can be told in tensors, else by a layer behind the writer."""
        centered = {node: Centered(axis) for node, axis in stream.values.items()}
        self.edit.move(list(stream.values), "the mean is taken out", centered)
        if self.kinds is not None:
            self._keep(stream, self.kinds)
            return
        done: set[int] = set()
        for writer in stream.writers:
            plan = self.writers.of(stream, writer)
            if isinstance(plan, str):
                insert_behind(self.edit, writer, "center", self.layer(stream.values[writer]))
            else:
                self._bake(plan, done)
        self.edit.sweep()

    def _keep(self, stream: Stream, kinds: Mapping[type[nn.Module], type[nn.Module]]) -> None:
        """Center at every call: each writer that is read before a dropout centers it, each dropout, each offset."""
        dropouts = [n for n in stream.values if isinstance(self.writers.uses.layer(n), _DropoutNd)]
        open_ends = [w for w in stream.writers if is_read(w, stream, dropouts)]
        by_path: dict[str, list[Node]] = {}
        for node in [*open_ends, *dropouts, *stream.offsets]:
            if self._centers(node, stream.values[node], kinds):
                by_path.setdefault(str(node.target), []).append(node)
            else:
                insert_behind(self.edit, node, "center", self.layer(stream.values[node]))
        for path, calls in by_path.items():
            layer = self.program.module.get_submodule(path)
            self.edit.replace_layer(path, like(layer, kinds[type(layer)]), calls)

    def _centers(self, node: Node, axis: int, kinds: Collection[type[nn.Module]]) -> bool:
        """Whether a layer of one of some kinds can stand in a node's place and center along an axis what it gives."""
        layer, value = self.writers.uses.layer(node), tensor_value(node)
        if type(layer) not in kinds or value is None:
            return False
        return axis == value.dim() - 1 if isinstance(layer, _DropoutNd) else averages(layer, node, axis)

    def _bake(self, plan: Written, done: set[int]) -> None:
        if plan.scale is not None:
            self.edit.move(plan.between, "its scale is folded")
            self.edit.rewire(plan.scale, plan.data())
        for path, axis in plan.tensors:
            if id(attribute(self.program.module, path)) in done:
                continue
            if path in plan.shared:
                names = self.edit.untie(path)
                self.warn(f"{path} is centered, and no longer shared with {', '.join(names)}")
            gains = () if plan.gain is None else (plan.gain,)
            self.edit.set_parameter(path, functools.partial(_centered, axis=axis), path, *gains)
            done.add(id(attribute(self.program.module, path)))
        if plan.scale is not None:
            self.edit.remove_unused([plan.scale], named(plan.node), "LayerScale folded")


def _gives_no_data(node: Node) -> bool:
    """Whether a node takes a size, a dtype or a device of what it reads, and no number of it."""
    given = any(isinstance(value, torch.Tensor) for value in leaves(node.meta.get("val")))
    return node.op == "call_function" and packet(node) is not aten.item and not given


def is_read(writer: Node, stream: Stream, stops: Collection[Node], passed: Collection[Node] = ()) -> bool:
    """Whether something (the readers ``passed`` left aside) reads what a writer wrote to a stream before it went through
    one of the values ``stops``.
    """
    read = {reader.value for reader in stream.readers if reader.node not in passed}
    ahead, seen = [writer], set(stops)
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        if node in read:
            return True
        seen.add(node)
        ahead += [user for user in node.users if user in stream]
    return False


def _centered(tensor: torch.Tensor, gain: torch.Tensor | None = None, *, axis: int) -> torch.Tensor:
    """diag(gain) T, less its mean along ``axis``."""
    if gain is not None:
        shape = [1] * tensor.dim()
        shape[axis] = -1
        tensor = tensor * gain.reshape(shape)
    return tensor - tensor.mean(axis, keepdim=True)
