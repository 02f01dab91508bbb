"""Keep what autograd saves for the backward compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rewrite.analysis.observe import first_inputs
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.nodes import fixed_size, tensor_value
from rewrite.graph.tree import on_meta
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.allotment import allotted
from rewrite.training.inventory import inventory
from rewrite.training.sensitivity import sensitivities

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_BOUNDS: dict[int, tuple[float, float]] = {8: (0.2, 0.98), 4: (1.0, 0.7), 2: (4.0, 0.3)}
"""Relative error and cosine that a gradient keeps to; where it is coarser, the model is not trained with so few bits."""


@dataclass(frozen=True)
class CompressActivations(Pass):
    """Keep saved tensors as whole numbers of 8, 4 or 2 bits in groups: min + scale · q, q = ⌊(x - min) / scale + u⌋.

    The forward is the same bit for bit; each storage is compressed once, masks to one bit. Parameters, buffers, inputs,
    integers, complex numbers (the report names who keeps them) and tensors of fewer than ``min_size`` numbers are kept as
    they are. With stochastic rounding the mean of the
    restored tensors is exact (but what lies between 0 and the first step of a group that begins at 0, as behind a ReLU, is
    not rounded to 0), new numbers are drawn at each step, and a seed gives the same ones. It is a property of the
    program: the grafted model has it too, a lowering for inference has not.

    ``bits=auto`` gives each tensor 8, 4 or 2 bits, ``average`` of them at most in the mean over all numbers, so that the
    variance that they cause in the gradient is least: Σ C / (2^bits - 1)², the C measured once on the first call of the data
    by one forward and a few backward passes. ``groups=heads`` has a group for each head, or channel of a map, of the
    tensor; ``format=fp8`` keeps x / scale in e4m3, scale = max |x| / 448 for each group (give it ``group=16``).

    Source: Liu et al., "GACT: Activation Compressed Training for Generic Network Architectures", ICML 2022
    (arXiv 2206.11357); Pan et al., "Mesa: A Memory-saving Training Framework for Transformers"
    (arXiv 2111.11124), whose ranges are running ones; Xi et al., "COAT", ICLR 2025 (arXiv 2410.19313).
    """

    name = "compress-activations"
    bits: Literal[8, 4, 2, "auto"] = option(8, "bits of a number: 8, 4, 2, or auto by data")
    average: float = option(4.0, "mean bits of a number, with bits=auto", at_least=2, at_most=8)
    group: int = option(256, "numbers that share a minimum and a scale, a multiple of 8", at_least=8, at_most=2**20)
    groups: Literal["flat", "heads"] = option("flat", "flat, as the numbers lie, or heads")
    format: Literal["int", "fp8"] = option("int", "int, or fp8: e4m3 with a scale for each group")
    rounding: Literal["stochastic", "nearest"] = option("stochastic", "stochastic or nearest")
    min_size: int = option(4096, "fewest numbers of a tensor that is compressed", at_least=1, at_most=2**30)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group % 8:
            raise OptionError(f"option 'group' of pass '{self.name}' is a multiple of 8, not {self.group}", "group")
        if self.format == "fp8" and (self.bits != type(self).bits or self.groups == "heads"):
            raise OptionError(f"option 'format' of pass '{self.name}': fp8 has 8 bits, in flat groups", "format")

    def contract(self) -> Contract:
        known = (4 if self.average >= 4 else 2) if self.bits == "auto" else self.bits
        bound, cosine = _BOUNDS[known]
        return Contract(forward=SAME, backward=ESTIMATE, bound=bound, cosine=cosine)

    def run(self, program: Program, context: Context) -> None:
        if not any(parameter.requires_grad for parameter in program.module.parameters()):
            return
        value: dict[str, Any] = {"group": self.group, "rounding": self.rounding, "min_size": self.min_size}
        value["bits"] = self._by_data(program, context) if self.bits == "auto" else self.bits
        if self.format != "int":
            value["format"] = self.format
        if self.groups == "heads":
            value["heads"] = _heads(program)
        context.edit.set_property("saved_tensors", value)
        for item in [] if on_meta(program.module) else inventory(program, context.seed):
            if item.obstacle and item.numbers >= self.min_size:
                context.skip(item.path or "the program", f"{item.keeper} keeps {item.bytes:,} bytes: {item.obstacle}")

    def _by_data(self, program: Program, context: Context) -> list[int]:
        """The bits of each tensor, in execution order; 8 for those that are too small to be compressed."""
        if context.data is None:
            raise RewriteError(f"{self.text} needs data: apply(..., data=...) or --data FILE")
        context.listener("measuring how sensitive the gradient is")
        found = sensitivities(program, first_inputs(program, context.data), self.min_size, context.seed)
        large = [place for place, each in enumerate(found) if each.size >= self.min_size]
        chosen = allotted([found[i].cost for i in large], [found[i].size for i in large], self.average)
        bits = dict(zip(large, chosen, strict=True))
        for place in large:
            context.measure(f"tensor {place}", numbers=found[place].size, variance=found[place].cost, bits=bits[place])
        return [bits.get(place, 8) for place in range(len(found))]


def _heads(program: Program) -> int:
    """How many heads the model's first attention has; 1 where it has none."""
    for node, layer in program.layers():
        value = tensor_value(node.all_input_nodes[0]) if isinstance(layer, ScaledDotProductAttention) else None
        heads = fixed_size(value.shape[-3]) if value is not None and value.dim() >= 3 else None
        if heads is not None:
            return heads
    return 1
