"""Activations that keep for their gradient only in which of a few intervals each element lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from rewrite.analysis.observe import data_or_examples, first_inputs, observe
from rewrite.analysis.writes import Writes
from rewrite.errors import OptionError, RewriteError, named_line
from rewrite.graph.spelled import SpelledActivation
from rewrite.graph.tree import on_meta
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.derivatives import Method, exact_steps, function, is_activation, steps_for, straight
from rewrite.training.kept import ACTIVATIONS, keeper
from rewrite.training.places import Place, adding, gates
from rewrite.training.probed import fewest_bits
from rewrite.training.stepped import bits_of, stepped
from rewrite.training.steps import Density, Steps, mean_slopes

if TYPE_CHECKING:
    from torch.fx import Node

    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


class FewBit(nn.Module):
    """y = inner(x) for an activation ``inner``; the gradient is dx = levels[i] · dy with i the number of borders below x.

    Kept for the backward are the i alone, in 1 to 6 bits. Without gradient it is ``inner`` and nothing else. ``density`` are
    mean and deviation of the x that the levels are best for, if they are for any.
    """

    def __init__(self, inner: nn.Module, steps: Steps, density: Density | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.density = None if density is None else (density.mean, density.deviation)
        self.borders = steps.borders
        self.levels = steps.levels
        self.closed = steps.closed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            plain: torch.Tensor = self.inner(x)
            return plain
        found: torch.Tensor = stepped(x, self.inner(x.detach()), self.borders, self.levels, self.closed)[0]
        return found

    def plain(self) -> nn.Module:
        """The activation, whose forward this is."""
        return self.inner

    def extra_repr(self) -> str:
        return f"bits={bits_of(self.levels)}"


_KEEP_RESULT = (nn.Tanh, nn.Sigmoid, nn.ReLU)
_BOUNDS: dict[str, tuple[float, float]] = {"few-bit": (1.0, 0.65), "approx-bp": (1.2, 0.6)}
"""Near 0 the derivative is 1/2; the two levels around are 0 and 1 in 1 bit, -0.05 and 1.05 in approx-bp."""


BOUND = 0.05
"""What the gradient of all parameters may be off with ``bits=auto``."""
_UNMEASURED = 4


class Site(NamedTuple):
    """An activation and its calls."""

    path: str
    types: tuple[str, ...]
    layer: nn.Module
    calls: list[Node]


@dataclass(frozen=True)
class _Layers:
    """The layers that stand for activations; equal activations have their steps made once."""

    sites: Sequence[Site]
    method: Method
    densities: Mapping[str, Density]
    known: dict[tuple[str, Density | None, int], Steps | None] = field(default_factory=dict)

    def of(self, bits: int) -> dict[str, FewBit]:
        """The layers by their paths."""
        found = {}
        for site in self.sites:
            density = self.densities.get(site.path)
            key = (repr(site.layer), density, bits)
            if key not in self.known:
                self.known[key] = steps_for(site.layer, bits, self.method, density)
            steps = self.known[key]
            assert steps is not None
            found[site.path] = FewBit(straight(site.layer), steps, density)
        return found


@dataclass(frozen=True)
class FewBitPass(Pass):
    """Keep a few bits an element for the gradient of an activation: dx = levels[i] · dy, i the interval of x.

    The forward is the activation's own, bit for bit. GELU, SiLU, Mish, softplus, ELU, SELU, hardswish, tanh and sigmoid get
    the best step function for their derivative, over all x alike as published, or with ``density=data`` for x as normal
    as those that each is given in the data's calls (the example inputs without): finer where they lie, be it near 0 or far
    out, as the softplus of a Mamba; ReLU, leaky ReLU, ReLU6 and hardtanh their exact derivative in 1 bit.
    ``method=approx-bp`` takes the 2 bits of ReGELU2 and ReSiLU2 for GELU and SiLU. A gated product f(g) · u keeps g and u
    alone, f(g) is computed again (the property ``recompute``): its gradient is exact. An activation is left alone, with the
    reason, where what it keeps is kept by another operator anyway. One that writes in place gets a result of its own; where
    something else sees what it writes, it is left alone.

    Errors add up over the depth of a model, and halve with each bit. ``bits=auto`` takes 3 or as many more as keep the
    gradient of all parameters within 0.05 of the exact one (relative, root mean square), measured on the first call of the
    data, or on the example inputs: 4 for two blocks of a GPT-2 with random weights, 5 or 6 for the twelve of a ViT.

    Source: Novikov et al., "Few-bit Backward: Quantized Gradients of Activation Functions for Memory Footprint Reduction",
    ICML 2023 (arXiv 2202.00441), section 3: borders and levels by dynamic programming; Yang et al., "Reducing Fine-Tuning
    Memory Overhead by Approximate and Memory-Sharing Backpropagation", ICML 2024 (arXiv 2406.16282).
    """

    name = "few-bit"
    inserts = (FewBit,)
    bits: Literal[1, 2, 3, 4, 5, 6, "auto"] = option("auto", "bits kept for each element, or auto; approx-bp has 2")
    method: Method = option("few-bit", "few-bit or approx-bp")
    density: Literal["flat", "data"] = option("flat", "which x the levels are best for: flat, all alike, or data")
    where: Selector = option(Selector("*"), "activations: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "approx-bp" and self.bits not in (2, "auto"):
            raise OptionError(f"option 'bits' of pass '{self.name}' is 2 with method=approx-bp, not {self.bits}", "bits")

    def contract(self) -> Contract:
        coarse = self.bits == 1 or self.method == "approx-bp"
        bound, cosine = _BOUNDS[self.method] if coarse else (None, None)
        return Contract(forward=SAME, backward=ESTIMATE, bound=bound, cosine=cosine)

    def run(self, program: Program, context: Context) -> None:
        writes = Writes(program.graph, program.module)
        gated = {place.path: place for place in gates(program)}
        products: list[Place] = []
        chosen: list[Site] = []
        for site in context.choose(_sites(program), self.where):
            if site.path in gated:
                products.append(gated[site.path])
                continue
            unknown = self.method == "approx-bp" and steps_for(site.layer, 2, self.method) is None
            reason = _obstacle(program, writes, site) or "approx-bp has no table for it" * unknown
            if reason:
                context.skip(site.path, reason)
            else:
                chosen.append(site)
        layers = _Layers(chosen, self.method, _densities(program, context, chosen) if self.density == "data" else {})
        bits = self._measured(program, context, layers) if self.bits == "auto" else self.bits
        for path, layer in layers.of(bits).items():
            context.edit.replace_layer(path, layer)
        before = program.properties.get("recompute")
        if products and adding(before, products) != adding(before, ()):
            context.edit.set_property("recompute", adding(before, products))

    def _measured(self, program: Program, context: Context, layers: _Layers) -> int:
        """The fewest bits, from three, that keep the gradient within its bound."""
        if self.method == "approx-bp" or on_meta(program.module) or all(exact_steps(s.layer) for s in layers.sites):
            return _UNMEASURED
        context.listener("measuring how far the gradient is off")
        inputs = first_inputs(program, context.data)
        try:
            bits, error = fewest_bits(program, inputs, layers.of, range(3, 7), BOUND, context.seed)
        except Exception as wrong:  # what a model's own code raises is without end
            context.warn(f"no gradient could be measured, which has {_UNMEASURED} bits now: {named_line(wrong)}")
            return _UNMEASURED
        context.measure("all parameters", bits=bits, off=error)
        if error > BOUND:
            context.warn(f"the gradient is {error:.2f} off with {bits} bits; give the levels data, or leave activations out")
        return bits

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any:
        """The mean of the activation's derivative over the interval in which x lies, or Σ a_i [x > c_i], times dy."""
        assert part.replaced is not None
        old, new = part.replaced
        assert isinstance(new, FewBit)
        assert old is not None
        if isinstance(old, nn.Hardtanh):
            return [((inputs[0] > old.min_val) & (inputs[0] < old.max_val)) * grad_outputs[0]]
        if self.method == "approx-bp" and len(new.levels) == 4:
            return [Steps(new.borders, new.levels).at(inputs[0]) * grad_outputs[0]]
        borders = torch.tensor(new.borders, dtype=torch.float64)
        place = torch.searchsorted(borders, inputs[0].cpu().contiguous())
        slopes = mean_slopes(function(old), borders, None if new.density is None else Density(*new.density))
        return [slopes[place].to(inputs[0].device) * grad_outputs[0]]


def _densities(program: Program, context: Context, sites: Sequence[Site]) -> dict[str, Density]:
    """Mean and deviation of what each activation is given, over all its calls."""
    data = data_or_examples(program, context.data)
    sources = list(dict.fromkeys(call.all_input_nodes[0] for site in sites for call in site.calls))
    found = observe(program, sources, data, progress=context.progress) if sources else {}
    made = {}
    for site in sites:
        given = [found[call.all_input_nodes[0]] for call in site.calls]
        mean = sum(float(each.mean) for each in given) / len(given)
        square = sum(float(each.rms) ** 2 for each in given) / len(given)
        made[site.path] = Density(mean, max(0.0, square - mean**2) ** 0.5)
    return made


def _sites(program: Program) -> list[Site]:
    found: dict[str, Site] = {}
    for node, layer in program.layers():
        if is_activation(layer, *ACTIVATIONS, *_KEEP_RESULT):
            kind = type(layer).__name__
            types = (kind, layer.function) if isinstance(layer, SpelledActivation) else (kind,)
            found.setdefault(str(node.target), Site(str(node.target), types, layer, [])).calls.append(node)
    return list(found.values())


def _obstacle(program: Program, writes: Writes, site: Site) -> str:
    """Why nothing would be saved there, or the function would be another; empty where neither is so."""
    for call in site.calls:
        source = call.all_input_nodes[0]
        result = isinstance(site.layer, _KEEP_RESULT) or (isinstance(site.layer, nn.Hardtanh) and site.layer.inplace)
        kept, what = (call, "result") if result else (source, "input")
        if kept.op in ("get_attr", "placeholder"):
            return (
                f"its input is {'an input of the model' if kept.op == 'placeholder' else kept.target}, which is there anyway"
            )
        keeps = keeper(program, kept, besides={call})
        if keeps:
            return f"its {what} is kept by {keeps} anyway"
        other = _seen(writes, source, call) if getattr(site.layer, "inplace", False) else ""
        if other:
            return f"it writes in place, into what {other} has too"
    if isinstance(site.layer, SpelledActivation):
        try:
            straight(site.layer)
        except RewriteError as error:
            return str(error)
    return ""


def _seen(writes: Writes, source: Node, call: Node) -> str:
    """Who sees what ``call`` writes into ``source``, besides who reads its result; empty where nobody does."""
    if source.op in ("placeholder", "get_attr"):
        return "the caller"
    others = [n for n in writes.sharers(source) if writes.position(n) < writes.position(call)]
    return next((n.name for n in [*others, *source.users] if n is not call), "")
