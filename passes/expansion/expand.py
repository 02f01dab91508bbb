"""More hidden units in FFNs, more heads, more channels, with the function kept."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from rewrite.axes.analyze import analyze
from rewrite.axes.resize import resize
from rewrite.errors import RewriteError
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.axes.call import Place
    from rewrite.axes.dims import Dim
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

#: How an entry may be worked on where readers of zeros keep it without effect.
_FREE = frozenset({"in", "batch", "elementwise", "group"})
_SIZE = re.compile(r"(?P<times>\d+(\.\d+)?)x|\+(?P<more>\d+)|(?P<size>\d+)")


class Site(NamedTuple):
    path: str
    types: tuple[str, ...]
    dim: Dim
    more: int


@dataclass(frozen=True)
class Expand(Pass):
    """Grow FFNs and attention, the function kept: W1' = [W1; M], b1' = [b1; M], W2' = [W2, 0].

    ``ffn`` gives each FFN more units, ``heads`` each attention more heads (with grouped queries more groups: key, value and
    query heads together). What writes the new units is drawn from a normal distribution with the deviation of the tensor it
    extends, from the seed; what reads them is 0, so that the forward and the gradients of all old parameters are the same,
    and the new parameters train. Gates, masks and gains go along. Sizes are absolute (`512`), more (`+4`) or times (`2x`).
    ``where`` chooses by the name of the dimension: `rewrite axes MODEL` prints them.

    Left alone, with the reason: a dimension that cannot change its size, and one whose entries meet each other (in a norm,
    a softmax), so that new ones would be felt. A size below today's is refused: that is pruning.

    Source: Gesmundo and Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023.
    """

    name = "expand"
    ffn: str = option("", "size of the FFNs: 512, +64 or 2x")
    heads: str = option("", "number of heads (of groups, where queries are grouped): 16, +4 or 2x")
    where: Selector = option(Selector("*"), "dimensions to grow, by name: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        for name, text in (("ffn", self.ffn), ("heads", self.heads)):
            if text and not _SIZE.fullmatch(text):
                raise RewriteError(f"expand{{{name}={text}}}: a size is a number (512), more (+64) or times (2x)")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Program, context: Context) -> None:
        table = analyze(program)
        sites = []
        for kind, names in (("ffn", ("ffn",)), ("heads", ("heads", "kv_heads"))):
            text = getattr(self, kind)
            named = [(n, d) for n, d in table.named.items() if text and n.split(".")[0] in names]
            for name, dim in named:
                if (reason := _obstacle(dim)) is not None:
                    context.skip(name, reason)
                elif (more := _grown(text, name, dim.size) - dim.size) > 0:
                    sites.append(Site(name, (kind,), dim, more))
        chosen = {s.dim: [*range(s.dim.size), *[-1] * s.more] for s in context.choose(sites, self.where)}
        if chosen:
            generator = torch.Generator().manual_seed(context.seed)
            resize(context.edit, table, chosen, partial(_filled, generator))


def _obstacle(dim: Dim) -> str | None:
    if dim.rigid:
        return dim.rigid
    meeting = sorted(dim.uses - _FREE)
    return f"its entries meet in {', '.join(meeting)}: new ones would be felt" if meeting else None


def _grown(text: str, name: str, size: int) -> int:
    """The new size. Raises RewriteError for one that is smaller, or no whole number."""
    found = _SIZE.fullmatch(text)
    assert found is not None
    times, more, absolute = found["times"], found["more"], found["size"]
    wanted = float(times) * size if times else float(size + int(more) if more else int(absolute))
    if wanted != math.floor(wanted):
        raise RewriteError(f"{text} of {name}, which is {size}, is no whole number")
    if wanted < size:
        raise RewriteError(f"{name} is {size} and would be {wanted:g}: expand grows; to shrink it is pruning")
    return int(wanted)


def _filled(
    generator: torch.Generator, path: str, tensor: torch.Tensor, places: Sequence[Place], shape: tuple[int, ...]
) -> torch.Tensor | None:
    """New entries: 0 where they are read, drawn where they are written, those of the first unit where they go along."""
    roles = {place.axis: place.role for place in places if place.role != "value"}
    grown = [axis for axis, size in enumerate(shape) if size != tensor.shape[axis]]
    if not tensor.is_floating_point() or any(roles.get(axis) == "in" for axis in grown):
        return None
    if any(roles.get(axis) == "out" for axis in grown):
        deviation = float(tensor.detach().double().std()) if tensor.numel() > 1 and not tensor.is_meta else 1.0
        return (deviation * torch.randn(shape, generator=generator, dtype=torch.float64)).to(tensor)
    for axis in grown:
        tensor = torch.cat([tensor, *[tensor.narrow(axis, 0, 1)] * (shape[axis] - tensor.shape[axis])], axis)
    return tensor
