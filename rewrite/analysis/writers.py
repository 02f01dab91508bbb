"""What writes into a stream, as tensors: which parameters lie along its hidden axis, and on which axis of theirs.

Whatever is to be done to a stream's hidden dimension (its mean taken out, a basis changed, a unit removed) is done to these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import TransposedLinear
from rewrite.graph.nodes import attribute, tensor_value
from rewrite.graph.program import Program

from .carry import carried, is_constant, scale_of, size
from .streams import Stream
from .uses import Uses

_ALONG: dict[type[nn.Module], tuple[tuple[str, int], ...]] = {
    nn.Linear: (("weight", 0), ("bias", 0)),
    TransposedLinear: (("weight", 1), ("bias", 0)),
    nn.Embedding: (("weight", 1),),
    nn.Conv1d: (("weight", 0), ("bias", 0)),
    nn.Conv2d: (("weight", 0), ("bias", 0)),
    nn.Conv3d: (("weight", 0), ("bias", 0)),
}


def along(layer: object) -> tuple[tuple[str, int], ...]:
    """The tensors of a plain layer that lie along the channels it writes, each with the axis of it that does."""
    return _ALONG.get(type(layer), ()) if isinstance(layer, nn.Module) else ()


def averages(layer: object, node: Node, axis: int) -> bool:
    """Whether the mean along ``axis`` of what a plain layer writes is what that of its tensors gives: they lie along it,
    each channel is made of the same inputs as the others, and of the tensors as they stand.
    """
    value = tensor_value(node)
    if value is None or not along(layer) or getattr(layer, "groups", 1) != 1 or getattr(layer, "max_norm", None) is not None:
        return False
    return axis == value.dim() - 1 - len(getattr(layer, "kernel_size", ()))


@dataclass(frozen=True)
class Written:
    """One writer of a stream: y = scale ∘ F(...), F linear in ``tensors``, each by its name and the axis that is hidden.

    ``shared`` names those that something else reads as well, under another name. ``scale`` is the product with a gain
    (a LayerScale) and ``gain`` its parameter's name; ``between`` the nodes from F to it, ``scale`` itself among them.
    """

    node: Node
    tensors: tuple[tuple[str, int], ...]
    shared: tuple[str, ...] = ()
    scale: Node | None = None
    gain: str | None = None
    between: tuple[Node, ...] = ()

    def data(self) -> Node:
        """What the gain is multiplied with."""
        return (*self.between[1:], self.node)[0]


class Writers:
    """Tells of the writers of streams, in one state of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.uses = Uses(program)

    def of(self, stream: Stream, node: Node) -> Written | str:
        """A writer's tensors; where it cannot be told in tensors, the reason."""
        if node.op == "get_attr":
            return self._checked(stream, Written(node, ((str(node.target), stream.values[node]),)))
        scaled = self._scaled(node, stream.values[node])
        inner = scaled.node if scaled is not None else node
        layer: Any = self.uses.layer(inner)
        if not averages(layer, inner, stream.values[node]):
            what = "along another axis" if along(layer) else "which is no linear layer, embedding, convolution or parameter"
            return f"{named(node)} writes to it, {what}"
        names = tuple(
            (f"{inner.target}.{name}", axis) for name, axis in along(layer) if getattr(layer, name, None) is not None
        )
        others = [n for n in self.uses.calls(str(inner.target)) if n not in stream and n is not inner]
        if others:
            return f"{inner.target}, which writes to it, is called elsewhere too"
        found = Written(inner, names)
        if scaled is not None:
            found = Written(inner, names, (), node, scaled.gain, scaled.between)
        return self._checked(stream, found)

    def _checked(self, stream: Stream, found: Written) -> Written | str:
        """With the tensors that others read too; refused where these have no name of their own."""
        shared = []
        for path, _ in found.tensors:
            tensor = attribute(self.program.module, path)
            if not isinstance(tensor, torch.Tensor):
                return f"{path}, which writes to it, is no parameter"
            readers = [n for n in self.uses.nodes(tensor) if n is not found.node and n not in stream.writers]
            own = [n for n in readers if n.op == "get_attr" and str(n.target) == path]
            if own:
                return f"{path}, which writes to it, is read elsewhere too"
            shared += [path] * bool(readers)
        return Written(found.node, found.tensors, tuple(shared), found.scale, found.gain, found.between)

    def _scaled(self, node: Node, axis: int) -> Written | None:
        """The product of a linear map with a gain: the map's node, the gain's name, the nodes between."""
        data = scale_of(node)
        if data is None:
            return None
        gain = next(a for a in node.args if isinstance(a, Node) and a is not data)
        between = [node]
        while not along(self.uses.layer(data)):
            sources = data.all_input_nodes
            if len(data.users) != 1 or len(sources) != 1 or carried(self.program, data, sources[0], axis) != axis:
                return None
            between.append(data)
            data = sources[0]
        number = tensor_value(gain)
        if len(data.users) != 1 or not is_constant(gain) or number is None or number.numel() != size(node, axis):
            return None
        while gain.op != "get_attr":
            (gain,) = gain.all_input_nodes
        return Written(data, (), (), node, str(gain.target), tuple(between))


def named(node: Node) -> str:
    """A node in the words of the user's model: a layer's path, an input, or the node's own name."""
    if node.op == "output":
        return "the model's output"
    return str(node.target) if node.op in ("call_module", "placeholder") else node.name
