"""Convolutions, and activations between them, dropped and the others made one, where that saves time at little error."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from rewrite.analysis.segments import LONGEST, Segment, SegmentValues, best_segments
from rewrite.analysis.sites import sites
from rewrite.analysis.writes import Writes
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


@dataclass(frozen=True)
class LayerMerge(Pass):
    """Drop activations and convolutions and make those in a row one, at the least error that `speedup` allows.

    Runs of convolutions with nothing but activations between them are cut into segments of up to 4, each of which becomes
    one convolution, as `merge-convs{hoist=true}` makes it. With `drop` any of its convolutions that give the shape they read
    may go as a whole, y = x; where all go, the activation before them does, too. A segment's time is that of the one
    convolution, measured here (``latency=flops``: its multiplications, the same on every machine), none where all go; its
    error is what its output moves, relative, root mean square, when its activations and those convolutions are dropped, on
    the data or else on the example inputs. Of all ways to cut and to drop, the one with the least sum of errors whose time
    is at most that of all these convolutions over `speedup` is taken, by dynamic programming, of those whose errors at what
    reads something dropped stay within ``bound`` on the example inputs. What is left is an approximation: it is held
    against ``bound`` and wants healing (`--heal`).

    Left alone, with the reason: convolutions that `merge-convs` leaves alone. Fold BatchNorm before it (`fold-batchnorm`).
    A speedup that no way of cutting reaches is refused, with the one that can be reached.

    Source: Kim et al., "LayerMerge: Neural Network Depth Compression through Layer Pruning and Merging", ICML 2024
    (arXiv 2406.12837). There importance is measured by training on.
    """

    name = "layer-merge"
    absence = "no convolution reads another, or its activation: fold-batchnorm takes norms out between them"
    speedup: float = option(1.5, "how many times faster the convolutions are to be together", above=1, at_most=100)
    latency: Literal["measured", "flops"] = option("measured", "what their time is: measured here, or multiplications")
    drop: bool = option(True, "convolutions that keep the shape may go as a whole, too")
    bound: float = option(1.0, "largest error of what reads something dropped, relative, root mean square", above=0)
    where: Selector = option(
        Selector("*"), "runs of convolutions, by the path of the first: path glob, type:, re:, !, with |"
    )

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        runs = context.choose(list(_runs(program, context)), self.where)
        layers = [link for run in runs for link in run.links]
        if not layers:
            return []
        if on_meta(program.module):
            raise RewriteError("layer-merge weighs convolutions by what they give: a model on the meta device has no values")
        droppable = _droppable(runs, program) if self.drop else set()
        allowed = list(_allowed(runs, droppable))
        row = [(link.path, link.activation is not None) for link in layers]
        example = SegmentValues(program, row, program.example_args, program.example_kwargs)
        call = None if context.data is None else next(iter(context.data), None)
        values = example if call is None else SegmentValues(program, row, call.args, call.kwargs)
        allowed = [s for s in allowed if example.largest(s) <= self.bound]
        errors = {s: values.error(s) for s in allowed}
        clock = _multiplications if self.latency == "flops" else functools.cache(_measured)
        times = {s: clock(_made(kept)) if (kept := _kept(s, layers)) else 0.0 for s in allowed}
        total = sum(times[i, i] for i in range(len(layers)))
        found = best_segments(len(layers), times, errors, total / self.speedup)
        if found is None:
            least = best_segments(len(layers), times, times, total)
            reach = total / sum(times[s] for s in least) if least else 1.0
            out = f"layer-merge: speedup={self.speedup:g} of these convolutions is out of reach"
            raise RewriteError(f"{out}: {reach:.2f} is the most (latency={self.latency}, bound={self.bound:g})")
        left, spent = [s for s in found if _kept(s, layers)], sum(times[s] for s in found)
        gained = {"speedup": total / spent} if spent else {}
        context.measure("convolutions", before=len(layers), after=len(left), **gained)
        return list(_merging(found, layers, self.bound))


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


def _droppable(runs: Sequence[Run], program: Program) -> set[Node]:
    """Convolutions that can go: what they give has the shape of what they read, and nothing writes into that then."""
    writes, found = Writes(program.graph, program.module), set[Node]()
    for run in runs:
        written = any(writes.into(link.node) for link in run.links)
        for place, link in enumerate(run.links):
            given, value = tensor_value(link.node.all_input_nodes[0]), tensor_value(link.node)
            keeps = given is not None and value is not None and str(given.shape) == str(value.shape)
            if keeps and (place or not written):
                found.add(link.node)
    return found


def _allowed(runs: Sequence[Run], droppable: Collection[Node]) -> Iterator[Segment]:
    """Every segment of up to LONGEST convolutions of one run, by their numbers in all runs, with each choice to drop."""
    start = 0
    for run in runs:
        able = [start + i for i, link in enumerate(run.links) if link.node in droppable]
        for i in range(start, start + len(run.links)):
            for j in range(i, min(i + LONGEST, start + len(run.links))):
                inside = [n for n in able if i <= n <= j]
                for size in range(len(inside) + 1):
                    yield from ((i, j, *gone) for gone in itertools.combinations(inside, size))
        start += len(run.links)


def _kept(segment: Segment, layers: Sequence[Link]) -> list[Link]:
    """The convolutions of a segment that are not dropped."""
    first, last, *gone = segment
    return [layers[i] for i in range(first, last + 1) if i not in gone]


class Made(NamedTuple):
    """The one convolution that a segment becomes: its class and sizes, the shapes that it reads and gives."""

    kind: type[Any]
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    given: tuple[int, ...]
    value: tuple[int, ...]
    like: tuple[torch.dtype, torch.device]


def _made(segment: Sequence[Link]) -> Made:
    first, kernel, apart = segment[0].layer, segment[0].layer.kernel_size, segment[0].layer.stride
    for link in segment[1:]:
        join = Join(tuple(s * d for s, d in zip(apart, link.layer.dilation, strict=True)), (1,) * len(kernel), 1)
        kernel = join.kernel(kernel, link.layer.kernel_size)
        apart = tuple(s * t for s, t in zip(apart, link.layer.stride, strict=True))
    given, value = tensor_value(segment[0].node.all_input_nodes[0]), tensor_value(segment[-1].node)
    assert given is not None
    assert value is not None
    sizes = [tuple(map(int, tensor.shape)) for tensor in (given, value)]
    channels, like = (first.in_channels, segment[-1].layer.out_channels), (first.weight.dtype, first.weight.device)
    return Made(type(first), channels, kernel, apart, first.groups, sizes[0], sizes[1], like)


def _multiplications(made: Made) -> float:
    return float(math.prod(made.value) * math.prod(made.kernel) * made.channels[0] / made.groups)


@torch.no_grad()
def _measured(made: Made) -> float:
    """Seconds: the median of nine calls."""
    padding, (dtype, device) = tuple(k // 2 for k in made.kernel), made.like
    layer = made.kind(*made.channels, made.kernel, made.stride, padding, groups=made.groups, dtype=dtype, device=device)
    x, times = torch.zeros(made.given, dtype=dtype, device=device), []
    for _ in range(10):
        began = time.perf_counter()
        layer(x)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _merging(found: Sequence[Segment], layers: Sequence[Link], bound: float) -> Iterator[Pass]:
    """The passes that do it: activations and convolutions dropped, then pair by pair padding hoisted and the two merged."""
    runs = [_kept(segment, layers) for segment in found]
    gone = [layers[i].path for _, _, *those in found for i in those]
    behind = [layers[i] for first, last, *those in found for i in range(first + (len(those) <= last - first), last + 1)]
    acts = [link.path for link in behind if link.activation is not None]
    if acts or gone:
        yield _Drop(",".join(acts), ",".join(gone), bound)
    for number in range(1, max(map(len, runs), default=0)):
        pairs = [(run[:number], run[number]) for run in runs if number < len(run)]
        padded = [second.path for before, second in pairs if any(_pads(link, second) for link in before)]
        if padded:
            yield _Hoist(",".join(padded), bound)
        yield _Merge(",".join(second.path for _, second in pairs))


def _pads(first: Link, second: Link) -> bool:
    return _changes(Pair(second.path, (), first.node, second.node, (first.layer, second.layer)))


@dataclass(frozen=True)
class _Drop(Pass):
    """Activations and convolutions dropped: y = x."""

    name = "drop-activations"
    before: str = option("", "paths of the convolutions that read the activations to drop")
    convs: str = option("", "paths of the convolutions to drop")
    bound: float = option(1.0, "largest error of what reads them, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        before, convs = self.before.split(","), self.convs.split(",")
        for node, _ in list(program.layers()):
            acts = [*node.all_input_nodes[:1]] if str(node.target) in before else []
            for gone in [*acts, node] if str(node.target) in convs else acts:
                source = gone.all_input_nodes[0]
                context.edit.rewire(gone, source)
                context.edit.write_apart(source)
                context.edit.remove_unused([gone], str(gone.target), "dropped")
        context.edit.sweep()
