"""Activations between convolutions dropped and the convolutions made one, where that saves time at little error."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewrite.analysis.segments import Segment, best_segments
from rewrite.analysis.sites import sites
from rewrite.errors import RewriteError
from rewrite.graph.nodes import tensor_value
from rewrite.graph.tree import on_meta
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import CLOSE, NEW, Contract

from .merge_convs import _CONVOLUTIONS, Join, Pair, _changes, _Hoist, _Merge, _obstacle

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_ACTIVATIONS = (nn.ReLU, nn.Hardtanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Mish)
LONGEST = 4
"""How many convolutions become one at most: kernels grow with each."""


@dataclass(frozen=True)
class LayerMerge(Pass):
    """Drop activations between convolutions and make the convolutions one, at the least error that `speedup` allows.

    Runs of convolutions with nothing but activations between them are cut into segments of up to 4, each of which becomes
    one convolution, as `merge-convs{hoist=true}` makes it. A segment's time is that of the one convolution, measured here
    (``latency=flops``: its multiplications, the same on every machine); its error is what its output moves, relative, root
    mean square, when the activations in it are dropped, on the data or else on the example inputs. Of all ways to cut, the
    one with the least sum of errors whose time is at most that of all these convolutions over `speedup` is taken, by dynamic
    programming. What is left is an approximation: it is held against ``bound`` and wants healing (`--heal`).

    Left alone, with the reason: convolutions that `merge-convs` leaves alone. Fold BatchNorm before it (`fold-batchnorm`).
    A speedup that no way of cutting reaches is refused, with the one that can be reached.

    Source: Kim et al., "LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging", ICML 2024
    (arXiv 2406.12837). There whole convolutions may go as well, and importance is measured by training on.
    """

    name = "layer-merge"
    absence = "no convolution reads another, or its activation: fold-batchnorm takes norms out between them"
    speedup: float = option(1.5, "how many times faster the convolutions are to be together", above=1, at_most=100)
    latency: Literal["measured", "flops"] = option("measured", "what their time is: measured here, or multiplications")
    bound: float = option(1.0, "largest error of what a convolution gives, relative, root mean square", above=0)
    where: Selector = option(
        Selector("*"), "runs of convolutions, by the path of the first: path glob, type:, re:, !, with |"
    )

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        runs = [run.links for run in context.choose(list(_runs(program, context)), self.where)]
        layers = [link for run in runs for link in run]
        if not layers:
            return []
        if on_meta(program.module):
            raise RewriteError("layer-merge weighs convolutions by what they give: a model on the meta device has no values")
        allowed = list(_allowed(runs))
        times = {s: _time(layers[s[0] : s[1] + 1], self.latency) for s in allowed}
        errors = _errors(program, layers, allowed, context)
        total = sum(times[i, i] for i in range(len(layers)))
        found = best_segments(len(layers), times, errors, total / self.speedup)
        if found is None:
            least = best_segments(len(layers), times, times, total)
            reach = total / sum(times[s] for s in least) if least else 1.0
            out = f"layer-merge: speedup={self.speedup:g} of these convolutions is out of reach"
            raise RewriteError(f"{out}: {reach:.2f} is the most (latency={self.latency})")
        chosen = [layers[first : last + 1] for first, last in found if last > first]
        context.measure("convolutions", before=len(layers), after=len(found), speedup=total / sum(times[s] for s in found))
        return list(_merging(chosen, self.bound))


class Link(NamedTuple):
    """A convolution of a run, and the activation between the one before and it, None where there is none."""

    node: Node
    path: str
    layer: Any
    activation: Node | None


class Run(NamedTuple):
    """Convolutions in a row that may become one, two at least; ``path`` is that of the first."""

    path: str
    types: tuple[str, ...]
    links: list[Link]


def _runs(program: Program, context: Context) -> Iterator[Run]:
    """Every run; what ends one is skipped with the reason."""
    found = {site.node: site for site in sites(program, *_CONVOLUTIONS)}
    after: dict[Node, Link] = {}
    for node, site in found.items():
        source = node.all_input_nodes[0]
        is_act = source.op == "call_module" and isinstance(program.layer(source), _ACTIVATIONS) and len(source.users) == 1
        first = source.all_input_nodes[0] if is_act else source
        if first not in found:
            continue
        reason = _obstacle(Pair(site.path, site.types, first, node, (found[first].layer, site.layer)), program)
        if reason and not (is_act and reason.startswith("something writes")):  # the activation itself, which goes
            context.skip(site.path, reason)
        else:
            after[first] = Link(node, site.path, site.layer, source if is_act else None)
    later = {link.node for link in after.values()}
    for node in [n for n in after if n not in later]:
        site = found[node]
        links = [Link(node, site.path, site.layer, None)]
        while links[-1].node in after:
            links.append(after[links[-1].node])
        yield Run(site.path, site.types, links)


def _allowed(runs: Sequence[Sequence[Link]]) -> Iterator[Segment]:
    """Every segment of up to LONGEST convolutions of one run, by their numbers in all runs."""
    start = 0
    for run in runs:
        for i in range(len(run)):
            yield from ((start + i, start + j) for j in range(i, min(i + LONGEST, len(run))))
        start += len(run)


def _time(segment: Sequence[Link], latency: str) -> float:
    """Seconds, or multiplications, of the one convolution that a segment becomes."""
    first, kernel, apart = segment[0].layer, segment[0].layer.kernel_size, segment[0].layer.stride
    for link in segment[1:]:
        join = Join(tuple(s * d for s, d in zip(apart, link.layer.dilation, strict=True)), (1,) * len(kernel), 1)
        kernel = join.kernel(kernel, link.layer.kernel_size)
        apart = tuple(s * t for s, t in zip(apart, link.layer.stride, strict=True))
    given, value = tensor_value(segment[0].node.all_input_nodes[0]), tensor_value(segment[-1].node)
    assert given is not None
    assert value is not None
    out = segment[-1].layer.out_channels
    if latency == "flops":
        return float(math.prod(map(int, value.shape)) * math.prod(kernel) * first.in_channels / first.groups)
    padding = tuple(k // 2 for k in kernel)
    made = type(first)(first.in_channels, out, kernel, apart, padding, groups=first.groups).to(first.weight)
    return _measured(made, torch.zeros(tuple(map(int, given.shape)), dtype=first.weight.dtype, device=first.weight.device))


@torch.no_grad()
def _measured(layer: nn.Module, x: Tensor) -> float:
    """The median of nine calls."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@torch.no_grad()
def _errors(
    program: Program, layers: Sequence[Link], allowed: Sequence[Segment], context: Context
) -> Mapping[Segment, float]:
    """‖y' - y‖ / ‖y‖ of each segment's output without its activations, from what flows into it."""
    module, inputs = program.clone().module.eval(), dict[str, Tensor]()

    def noting(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0].detach().clone()

        return note

    hooks = [module.get_submodule(link.path).register_forward_pre_hook(noting(link.path)) for link in layers]
    call = None if context.data is None else next(iter(context.data), None)
    args, kwargs = (program.example_args, program.example_kwargs) if call is None else (call.args, call.kwargs)
    module(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    found = {}
    for first, last in allowed:
        segment = layers[first : last + 1]
        true, plain = (_through(segment, module, inputs[segment[0].path], keep) for keep in (True, False))
        found[first, last] = float((plain - true).norm() / true.norm().clamp_min(1e-30))
    return found


def _through(segment: Sequence[Link], module: nn.Module, x: Tensor, keep: bool) -> Tensor:
    for i, link in enumerate(segment):
        if i and keep and link.activation is not None:
            x = module.get_submodule(str(link.activation.target))(x.clone())
        x = module.get_submodule(link.path)(x)
    return x


def _merging(chosen: Sequence[Sequence[Link]], bound: float) -> Iterator[Pass]:
    """The passes that do it: activations dropped, then pair by pair padding hoisted and convolutions merged."""
    dropped = [str(link.activation.target) for run in chosen for link in run[1:] if link.activation is not None]
    if dropped:
        yield _Drop(",".join(dropped), bound)
    for number in range(1, max(map(len, chosen), default=0)):
        pairs = [(run[:number], run[number]) for run in chosen if number < len(run)]
        padded = [second.path for before, second in pairs if any(_pads(link, second) for link in before)]
        if padded:
            yield _Hoist(",".join(padded), bound)
        yield _Merge(",".join(second.path for _, second in pairs))


def _pads(first: Link, second: Link) -> bool:
    return _changes(Pair(second.path, (), first.node, second.node, (first.layer, second.layer)))


@dataclass(frozen=True)
class _Drop(Pass):
    """Activations dropped."""

    name = "drop-activations"
    paths: str = option("", "their paths")
    bound: float = option(1.0, "largest error of what reads them, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        for node, _ in list(program.layers()):
            if str(node.target) in self.paths.split(","):
                context.edit.rewire(node, node.all_input_nodes[0])
                context.edit.remove_unused([node], str(node.target), "dropped")
        context.edit.sweep()
