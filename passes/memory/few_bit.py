"""Activations that keep for their gradient only in which of a few intervals each element lies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.analysis.writes import Writes
from rewrite.errors import RewriteError
from rewrite.graph.like import like
from rewrite.graph.spelled import SpelledActivation
from rewrite.graph.straight import Straight
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.kept import keeper
from rewrite.training.stepped import bits_of, stepped
from rewrite.training.steps import Steps, best_steps, mean_slopes

if TYPE_CHECKING:
    from torch.fx import Node

    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part


class FewBit(nn.Module):
    """y = inner(x) for an activation ``inner``; the gradient is dx = levels[i] · dy with i the number of borders below x.

    Kept for the backward are the i alone, in 1 to 4 bits. Without gradient it is ``inner`` and nothing else.
    """

    def __init__(self, inner: nn.Module, steps: Steps) -> None:
        super().__init__()
        self.inner = inner
        self.borders = steps.borders
        self.levels = steps.levels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            plain: torch.Tensor = self.inner(x)
            return plain
        found: torch.Tensor = stepped(x, self.inner(x.detach()), self.borders, self.levels)[0]
        return found

    def plain(self) -> nn.Module:
        """The activation, whose forward this is."""
        return self.inner

    def extra_repr(self) -> str:
        return f"bits={bits_of(self.levels)}"


_KEEP_INPUT = (nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.ELU, nn.SELU, nn.Hardswish, nn.LeakyReLU)
_KEEP_RESULT = (nn.Tanh, nn.Sigmoid, nn.ReLU)
_EXACT = (nn.ReLU, nn.LeakyReLU)
_SPELLED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
}


class Site(NamedTuple):
    path: str
    types: tuple[str, ...]
    layer: nn.Module
    calls: list[Node]


@dataclass(frozen=True)
class FewBitPass(Pass):
    """Keep 1 to 4 bits an element for the gradient of an activation: dx = levels[i] · dy, i the interval of x.

    The forward is the activation's own, bit for bit. GELU, SiLU, Mish, softplus, ELU, SELU, hardswish, tanh and sigmoid get
    the best step function for their derivative, ReLU and leaky ReLU their exact derivative in 1 bit. An activation is left
    alone, with the reason, where what it keeps is kept by another operator anyway. One that writes in place gets a result of
    its own; where something else sees what it writes, it is left alone.

    Source: Novikov et al., "Few-bit Backward: Quantized Gradients of Activation Functions for Memory Footprint Reduction",
    ICML 2023 (arXiv 2202.00441), section 3: borders and levels by dynamic programming.
    """

    name = "few-bit"
    inserts = (FewBit,)
    bits: int = option(3, "bits kept for each element", at_least=1, at_most=4)
    where: Selector = option(Selector("*"), "activations: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        # near 0 the derivative is 1/2, and the two levels of a single bit are 0 and 1
        bound, cosine = (1.0, 0.65) if self.bits == 1 else (None, None)
        return Contract(forward=SAME, backward=ESTIMATE, bound=bound, cosine=cosine)

    def run(self, program: Program, context: Context) -> None:
        known: dict[str, Steps] = {}
        writes = Writes(program.graph, program.module)
        for site in context.choose(_sites(program), self.where):
            reason = _obstacle(program, writes, site)
            if reason:
                context.skip(site.path, reason)
                continue
            key = repr(site.layer)
            known[key] = known[key] if key in known else self._steps(site.layer)
            context.edit.replace_layer(site.path, FewBit(_inner(site.layer), known[key]))

    def _steps(self, layer: nn.Module) -> Steps:
        if isinstance(layer, _EXACT):
            return Steps((0.0,), tuple(mean_slopes(_function(layer), torch.zeros(1, dtype=torch.float64)).tolist()))
        return best_steps(_function(layer), self.bits)

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any:
        """The mean of the activation's derivative over the interval in which x lies, times dy."""
        assert part.replaced is not None
        old, new = part.replaced
        assert isinstance(new, FewBit)
        assert old is not None
        borders = torch.tensor(new.borders, dtype=torch.float64)
        place = torch.searchsorted(borders, inputs[0].cpu().contiguous())
        return [mean_slopes(_function(old), borders)[place].to(inputs[0].device) * grad_outputs[0]]


def _function(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation in whatever dtype it is called: what a library spells out casts as it likes."""
    return _SPELLED[layer.function] if isinstance(layer, SpelledActivation) else _inner(layer)


def _inner(layer: nn.Module) -> nn.Module:
    """The activation as a layer of its own, that writes nothing."""
    if isinstance(layer, SpelledActivation):
        return Straight.of(layer.graphs["any"])
    return like(layer, type(layer), inplace=False) if hasattr(layer, "inplace") else copy.deepcopy(layer)


def _sites(program: Program) -> list[Site]:
    found: dict[str, Site] = {}
    for node, layer in program.layers():
        spelled = isinstance(layer, SpelledActivation) and layer.function in _SPELLED
        if spelled or type(layer) in (*_KEEP_INPUT, *_KEEP_RESULT):
            types = (
                (type(layer).__name__, layer.function) if isinstance(layer, SpelledActivation) else (type(layer).__name__,)
            )
            found.setdefault(str(node.target), Site(str(node.target), types, layer, [])).calls.append(node)
    return list(found.values())


def _obstacle(program: Program, writes: Writes, site: Site) -> str:
    """Why nothing would be saved there, or the function would be another; empty where neither is so."""
    for call in site.calls:
        source = call.all_input_nodes[0]
        kept, what = (call, "result") if isinstance(site.layer, _KEEP_RESULT) else (source, "input")
        keeps = keeper(program, kept, besides=call)
        if keeps:
            return f"its {what} is kept by {keeps} anyway"
        other = _seen(writes, source, call) if getattr(site.layer, "inplace", False) else ""
        if other:
            return f"it writes in place, into what {other} has too"
    if isinstance(site.layer, SpelledActivation):
        try:
            _inner(site.layer)
        except RewriteError as error:
            return str(error)
    return ""


def _seen(writes: Writes, source: Node, call: Node) -> str:
    """Who sees what ``call`` writes into ``source``, besides who reads its result; empty where nobody does."""
    if source.op in ("placeholder", "get_attr"):
        return "the caller"
    others = [n for n in writes.sharers(source) if writes.position(n) < writes.position(call)]
    return next((n.name for n in [*others, *source.users] if n is not call), "")
