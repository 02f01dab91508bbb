"""Two convolutions in a row as one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx import Node

from rewrite.analysis.sites import Site, sites
from rewrite.analysis.uses import Uses
from rewrite.analysis.writes import Writes
from rewrite.graph.like import like
from rewrite.graph.nodes import attribute
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

if TYPE_CHECKING:
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context
    from rewrite.proof.part import Part

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class MergeConvs(Pass):
    """Make two convolutions with nothing between them one: W[s1 d2 b + d1 a] = Σ W2[b] W1[a], b = b2 + Σ W2[b] b1.

    a and b count the kernels' places, s and d are strides and dilations. The one has a kernel of d1 (k1 - 1) + 1 +
    s1 d2 (k2 - 1), stride s1 s2 and padding p1 + s1 p2. It is the same function, gradients included, where the second pads
    nothing, or the first is 1 wide without padding and bias (its zeros are zeros then). With `hoist` others are merged as
    well, in two steps: the second's padding is taken to before the first, which changes what is next to the border, is
    measured and held against `bound`; then merging is exact. It saves a layer, not always arithmetic: two 3 x 3 kernels are
    one of 5 x 5. Run it again for more than two in a row, and `fold-batchnorm` before it.

    Left alone, with the reason: convolutions whose first output is read elsewhere too, of other groups than each other, that
    pad by other than zeros, are called twice or share a tensor.

    Source: Kim et al., "Efficient Latency-Aware CNN Depth Compression via Two-Stage Dynamic Programming", ICML 2023
    (arXiv 2301.12187), section 2; where it reorders padding, that is `hoist`.
    """

    name = "merge-convs"
    absence = "no convolution reads another: fold-batchnorm takes norms out between them, layer-merge activations"
    hoist: bool = option(False, "merge where the second pads as well: its padding is moved to before the first")
    bound: float = option(1.0, "with hoist: largest error of what the second gives, relative, root mean square", above=0)
    where: Selector = option(Selector("*"), "pairs, by the path of the second: path glob, type:, re:, !, several with |")

    def contract(self) -> Contract:
        return (
            Contract(forward=CLOSE, backward=NEW, bound=self.bound) if self.hoist else Contract(forward=SAME, backward=SAME)
        )

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        ready, padded = list[str](), list[str]()
        taken: set[Node] = set()
        for pair in context.choose(list(_pairs(program)), self.where):
            reason = _obstacle(pair, program) or ("it is merged with the one before" if pair.first in taken else "")
            if not reason and _changes(pair):
                reason = (
                    ""
                    if self.hoist
                    else "it pads what the first gives, which is no zero there; hoist=true moves the padding"
                )
                padded += [] if reason else [pair.path]
            if reason:
                context.skip(pair.path, reason)
            else:
                taken.update((pair.first, pair.second))
                ready.append(pair.path)
        hoisted = [_Hoist(",".join(padded), self.bound)] if padded else []
        return [*hoisted, _Merge(",".join(ready))] if ready else []


class Pair(NamedTuple):
    """Two convolutions, the second of which reads the first."""

    path: str
    types: tuple[str, ...]
    first: Node
    second: Node
    layers: tuple[Any, Any]


def _pairs(program: Program) -> Iterator[Pair]:
    found: dict[Node, Site] = {site.node: site for site in sites(program, *_CONVOLUTIONS)}
    for node, site in found.items():
        before = node.args[0]
        if isinstance(before, Node) and before in found:
            yield Pair(site.path, site.types, before, node, (found[before].layer, site.layer))


def _obstacle(pair: Pair, program: Program) -> str:
    first, second = pair.layers
    uses = Uses(program)
    if type(first) is not type(second) or type(first) not in _CONVOLUTIONS:
        return "one of the two is more than a plain convolution"
    if len(pair.first.users) > 1:
        return f"{pair.first.target} is read elsewhere too"
    if first.groups != second.groups:
        return "the two have other groups"
    if any(layer.padding_mode != "zeros" or isinstance(layer.padding, str) for layer in pair.layers):
        return "one of the two pads by other than a number of zeros"
    for node, layer in zip((pair.first, pair.second), pair.layers, strict=True):
        if len(uses.calls(str(node.target))) > 1 or not uses.alone(layer.weight):
            return f"{node.target} is called or held elsewhere too"
    return "something writes into what flows between them" if Writes(program.graph, program.module).into(pair.first) else ""


def _changes(pair: Pair) -> bool:
    """Whether the second pads with zeros what would be something else."""
    first, second = pair.layers
    zero = first.bias is None and all(size == 1 for size in first.kernel_size) and not any(first.padding)
    return any(second.padding) and not zero


@dataclass(frozen=True)
class _Hoist(Pass):
    """Pad before the first of two convolutions what the second would pad."""

    name = "hoist-padding"
    pairs: str = option("", "the path of the second of each pair")
    bound: float = option(1.0, "largest error of what the second gives, relative, root mean square")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW, bound=self.bound)

    def run(self, program: Program, context: Context) -> None:
        for pair in [pair for pair in _pairs(program) if pair.path in self.pairs.split(",")]:
            first, second = pair.layers
            wide = like(first, type(first), padding=_wide(first, second))
            context.edit.replace_layer(str(pair.first.target), wide, reshape=True)
            context.edit.replace_layer(
                pair.path, like(second, type(second), padding=(0,) * len(second.padding)), reshape=True
            )

    def formula(self, part: Part, *inputs: Tensor) -> Tensor:
        """Zeros around, then both convolutions without any."""
        layers: tuple[Any, ...] = tuple(part.new.values())
        x, (first, second) = inputs[0], layers
        around = [size for side in reversed(first.padding) for size in (side, side)]
        return _plain(second, _plain(first, F.pad(x, around)))


def _plain(layer: Any, x: Tensor) -> Tensor:
    compute = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    found: Tensor = compute(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    return found


def _wide(first: Any, second: Any) -> tuple[int, ...]:
    """p1 + s1 p2."""
    return tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding, strict=True))


@dataclass(frozen=True)
class _Merge(Pass):
    """Make pairs of convolutions one each."""

    name = "merge-pairs"
    pairs: str = option("", "the path of the second of each pair")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        for pair in [pair for pair in _pairs(program) if pair.path in self.pairs.split(",")]:
            _merge(pair, program, context)
        context.edit.sweep()


def _merge(pair: Pair, program: Program, context: Context) -> None:
    edit, (first, second) = context.edit, pair.layers
    one, two = str(pair.first.target), pair.path
    path = f"{two}_{one.rpartition('.')[2]}"
    while attribute(program.module, path) is not None:
        path += "_merged"
    join = Join(tuple(s * d for s, d in zip(first.stride, second.dilation, strict=True)), first.dilation, first.groups)
    biased = first.bias is not None or second.bias is not None
    made = type(second)(
        first.in_channels,
        second.out_channels,
        join.kernel(first.kernel_size, second.kernel_size),
        tuple(s * t for s, t in zip(first.stride, second.stride, strict=True)),
        _wide(first, second),
        groups=first.groups,
        bias=biased,
        device="meta",
        dtype=second.weight.dtype,
    ).to_empty(device=second.weight.device)
    node = edit.insert_layer(path, made.train(second.training), [pair.first.args[0]], after=pair.second)
    edit.set_parameter(f"{path}.weight", join.weight, f"{one}.weight", f"{two}.weight")
    if biased:
        own = [f"{p}.bias" for p, layer in ((one, first), (two, second)) if layer.bias is not None]
        edit.set_parameter(
            f"{path}.bias",
            join.both if len(own) == 2 else join.carried if first.bias is not None else _itself,
            *([f"{two}.weight"] if first.bias is not None else []),
            *own,
        )
    edit.rewire(pair.second, node)
    edit.remove_unused([pair.second, pair.first], two, f"it and {one} are one")


@dataclass(frozen=True)
class Join:
    """How two kernels become one: the places of the second lie ``apart``, those of the first ``dilation``."""

    apart: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def kernel(self, first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
        """d1 (k1 - 1) + s1 d2 (k2 - 1) + 1."""
        sizes = zip(first, second, self.dilation, self.apart, strict=True)
        return tuple(d * (k - 1) + far * (m - 1) + 1 for k, m, d, far in sizes)

    def weight(self, first: Tensor, second: Tensor) -> Tensor:
        """W [out, in / groups, ...] of W1 [middle, in / groups, ...] and W2 [out, middle / groups, ...]."""
        one, two = (w.unflatten(0, (self.groups, -1)) for w in (first, second))
        sizes = self.kernel(first.shape[2:], second.shape[2:])
        made = first.new_zeros(*two.shape[:2], first.shape[1], *sizes)
        for place in itertools.product(*map(range, second.shape[2:])):
            starts = [far * at for far, at in zip(self.apart, place, strict=True)]
            window = tuple(
                slice(start, start + d * (k - 1) + 1, d)
                for start, d, k in zip(starts, self.dilation, first.shape[2:], strict=True)
            )
            part = torch.einsum("gom,gmi...->goi...", two[(slice(None), slice(None), slice(None), *place)], one)
            made[(slice(None), slice(None), slice(None), *window)] += part
        return made.flatten(0, 1)

    def carried(self, second: Tensor, bias: Tensor) -> Tensor:
        """Σ W2[b] b1."""
        summed = second.flatten(2).sum(2).unflatten(0, (self.groups, -1))
        return torch.einsum("gom,gm->go", summed, bias.unflatten(0, (self.groups, -1))).flatten()

    def both(self, second: Tensor, bias: Tensor, own: Tensor) -> Tensor:
        """b2 + Σ W2[b] b1."""
        return own + self.carried(second, bias)


def _itself(bias: Tensor) -> Tensor:
    return bias.clone()
