"""Which values the backward keeps anyway, since an operator that reads them needs them for its gradient."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ScaledDotProductAttention, TransposedLinear
from rewrite.graph.nodes import aten, packet
from rewrite.graph.program import Program
from rewrite.graph.regions import Region

NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.ELU,
    nn.SELU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.ReLU6,
    nn.LeakyReLU,
)
"""Those that keep their input, unless they write in place; the others keep their result."""
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.PReLU,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    ScaledDotProductAttention,
    TransposedLinear,
    Region,
    *NORMS,
    *ACTIVATIONS,
)
_OPERATORS = (
    aten.mul,
    aten.div,
    aten.matmul,
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.pow,
    aten.linear,
    aten.max_pool1d,
    aten.max_pool2d,
    aten.max_pool3d,
)
_VIEWS = (
    aten.view,
    aten.reshape,
    aten.flatten,
    aten.unflatten,
    aten.transpose,
    aten.permute,
    aten.squeeze,
    aten.unsqueeze,
    aten.expand,
    aten.t,
    aten.slice,
    aten.select,
)


def keeper(program: Program, value: Node, besides: Collection[Node] = (), *, results: bool = True) -> str:
    """What keeps a value for its own gradient, by path or name; empty where nothing does that is known.

    The readers of its views count too, those ``besides`` do not. A result of the model lives as long as its reader
    wants, which counts with ``results``.
    """
    for reader in value.users:
        if reader in besides:
            continue
        if reader.op == "output":
            if results:
                return "the model's output"
            continue
        if packet(reader) in _VIEWS:
            found = keeper(program, reader, besides, results=results)
            if found:
                return found
        elif packet(reader) in _OPERATORS:
            return reader.name
        elif reader.op == "call_module" and isinstance(program.layer(reader), _LAYERS):
            return str(reader.target)
    return ""
