"""A larger model that computes the same: wider FFNs, more and larger heads, a wider stream, more layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from rewrite.axes.analyze import analyze
from rewrite.axes.channels import channels_obstacle, channels_of
from rewrite.axes.cloning import COPIED, copies_of, copy_obstacle, prepare_copies, untied
from rewrite.axes.copies import Copies, copy_units
from rewrite.axes.fills import Init
from rewrite.axes.growth import grow
from rewrite.axes.kinds import KINDS, group_of, growth_of, obstacle, of_kind, prepare
from rewrite.errors import RewriteError
from rewrite.pipeline.deepening import Where, deepen, places, stacks
from rewrite.pipeline.identities import deepen_by_identities, deepenings
from rewrite.pipeline.pass_ import Pass, option
from rewrite.pipeline.select import Selector
from rewrite.pipeline.sizes import check_size, grown
from rewrite.proof.contract import SAME, Contract

if TYPE_CHECKING:
    from rewrite.axes.dims import Dim
    from rewrite.axes.table import Table
    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context


class Site(NamedTuple):
    """A dimension with its new size, or a list of blocks with how many more there are to be; or why it stays."""

    path: str
    types: tuple[str, ...]
    what: Any
    size: int
    reason: str = ""


@dataclass(frozen=True)
class Expand(Pass):
    """Grow a model in any of its dimensions, the function kept: W1' = [W1; M], b1' = [b1; M], W2' = [W2, 0].

    ``ffn`` gives each FFN more units, ``heads`` each attention more heads (query heads; where they share key heads, whole
    groups), ``value_dim`` longer values: what writes the new units is free, what reads them is 0. ``head_dim`` gives longer
    queries and keys, free in the queries and 0 in the keys, which are scaled by √(k'/k) where attention divides by √k'.
    ``hidden`` widens the stream: what writes to it is 0 in the new units, what reads them is free, each RMSNorm's gain is
    scaled by √(h/h') and its eps by h/h'. ``layers`` puts blocks between the blocks, which add 0 to the stream at first: the
    projections that write to it are 0, or the gain of the norm that ends them; ``at=copy`` copies the other weights from the
    block before (LLaMA-Pro). Blocks are numbered anew, in order.

    Sizes are absolute (`512`), more (`+4`) or times (`2x`), any of them at once. ``where`` chooses by the name of the
    dimension, which `rewrite axes MODEL` prints, and layers by the path of their list.

    The forward and the gradients of all old parameters are the same, and the new parameters train. ``init`` says what free
    entries are: `normal` at the deviation of the weight, `orthogonal`, `zero` (zeros and ones: a partial identity),
    `hadamard`, or `copy` of the units there are.

    ``method=lemon`` copies units of FFNs, heads and the stream instead, of LayerNorm models too, and lets what reads m
    copies take W/m + N_i of each, Σ N_i = 0: the stream is [x .. x, mean x] (0 with RMSNorm) where it is no multiple, gain
    and eps of norms change by q D / D'. ``method=clone`` (HyperCloning) takes whole factors; N is ``snr`` decibels below the
    weight, without it there is none and copies stay alike. Layers are as before.

    ``method=net2net channels=2x`` copies the channels and hidden units of convolutional nets and MLPs, through BatchNorm,
    concatenations, residual sums and depthwise convolutions; what reads the copies is split as with lemon. ``method=net2net
    layers=+2`` puts identities behind activations with f(f(x)) = f(x), ReLU and its like, and each again one behind it.

    Refused where every place has an obstacle, by name: a dimension that cannot change, or whose entries meet each other in
    a norm or a softmax; head_dim under rotary embeddings or QK-norm; hidden under LayerNorm (run `rmsnorm` first) or where
    it is the model's output; heads that are no multiple of the group; layers of Post-LN models; a size below today's; by
    copies a tied head without ``untie``, a stream of Post-LN that is no multiple. Other places are left alone.

    Source: Gesmundo and Maile, Composable Function-preserving Expansions for Transformer Architectures, 2023
    (arXiv 2308.06103), which leaves eps as it is; Wu et al., LLaMA Pro, ACL 2024; Wang et al.,
    LEMON, ICLR 2024; Samragh et al., Scaling Smart (HyperCloning), 2024;
    Chen et al., Net2Net, ICLR 2016, section 2.
    """

    name = "expand"
    ffn: str = option("", "size of the FFNs: 512, +64 or 2x")
    heads: str = option("", "number of query heads: 16, +4 or 2x")
    head_dim: str = option("", "size of a head's queries and keys")
    value_dim: str = option("", "size of a head's values")
    hidden: str = option("", "size of the stream")
    channels: str = option("", "size of the channels and hidden units of convolutional nets and MLPs (method=net2net)")
    method: Literal["pad", "lemon", "clone", "net2net"] = option("pad", "pad: zeros; others: copies, split by readers")
    snr: float | None = option(None, "how far copies are apart, in decibels below the weights: none for clone, 0 for lemon")
    untie: bool = option(False, "let a tied head have a weight of its own, where copies ask for it")
    layers: str = option("", "number of blocks in each list of them")
    at: Where = option("even", "where new blocks go: even, end, or copy (even, with the weights of the block before)")
    init: Init = option("normal", "what free entries are: normal, zero, orthogonal, hadamard or copy")
    where: Selector = option(Selector("*"), "dimensions to grow, by name: path glob, type:, re:, !, several with |")

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in (*KINDS, "layers", "channels"):
            if getattr(self, kind):
                check_size(getattr(self, kind), f"expand: {kind}")
        net2net = self.method == "net2net"
        if (bool(self.channels) and not net2net) or (net2net and any(getattr(self, kind) for kind in KINDS)):
            raise RewriteError("expand: channels and method=net2net go together, without other sizes: use several passes")
        if net2net and bool(self.channels) == bool(self.layers):
            raise RewriteError("expand: channels and method=net2net go together, or layers and it: one of the two")
        if self.method != "pad" and (self.head_dim or self.value_dim):
            raise RewriteError(f"expand: method={self.method} copies {', '.join(COPIED)}; longer heads are for method=pad")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        """Wider first, then deeper: each is proven by itself."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.method == "net2net":
            return [(_Copying if self.channels else _Identities)(**options)]
        if not any(getattr(self, kind) for kind in (*KINDS, "layers")):
            raise RewriteError(
                f"expand: nothing is told to grow: give {', '.join(KINDS)} or layers a size, as in "
                "expand{ffn=2x layers=+1}, or channels with method=net2net"
            )
        wider, deeper = _Wider(**{**options, "layers": ""}), _Deeper(**{**options, **dict.fromkeys(KINDS, "")})
        parts, sites = [wider, deeper], [wider.sites(program, analyze(program)), deeper.sites(program)]
        chosen = [any(self.where.matches(s.path, s.types) and not s.reason for s in own) for own in sites]
        if not any(chosen):
            context.choose([s for own in sites for s in own if not s.reason], self.where)
        return [part for part, own, wanted in zip(parts, sites, chosen, strict=True) if wanted or any(s.reason for s in own)]


@dataclass(frozen=True)
class _Part(Expand):
    """A part of it, run and proven by itself."""

    steps = Pass.steps

    def chosen(self, sites: Sequence[Site], context: Context) -> list[Site]:
        """The places that are to grow; the others are noted."""
        for site in sites:
            if site.reason:
                context.skip(site.path, site.reason)
        return context.choose([site for site in sites if not site.reason], self.where)


@dataclass(frozen=True)
class _Wider(_Part):
    """All but layers."""

    def run(self, program: Program, context: Context) -> None:
        table, edit, generator = analyze(program), context.edit, torch.Generator().manual_seed(context.seed)
        chosen = self.chosen(self.sites(program, table), context)
        if self.method == "pad":
            growths = [(s.types[0], growth_of(program, table, s.types[0], table.named[s.path], s.size)) for s in chosen]
            for kind, growth in growths:
                prepare(edit, table, kind, growth)
            if growths:
                grow(edit, table, [growth for _, growth in growths], self.init, generator)
            return
        tables = [name for site in chosen for name in untied(edit, table, table.named[site.path])] if self.untie else []
        table = analyze(program) if tables else table
        copied = [(s.types[0], copies_of(program, table, s.types[0], table.named[s.path], s.size)) for s in chosen]
        for kind, copies in copied:
            prepare_copies(edit, table, kind, copies)
        snr = self.snr if self.snr is not None or self.method == "clone" else 0.0
        copy_units(edit, table, [copies for _, copies in copied], 0.0 if snr is None else 10 ** (-snr / 20), generator)

    def sites(self, program: Program, table: Table) -> list[Site]:
        """The dimensions of each kind that is to grow."""
        return [site for kind in KINDS if getattr(self, kind) for site in self._of(kind, program, table)]

    def _of(self, kind: str, program: Program, table: Table) -> list[Site]:
        """The dimensions of a kind; raises RewriteError where there are some and none can grow."""
        named = dict(of_kind(table, kind))
        if kind == "value_dim" and not named and any(of_kind(table, "head_dim")):
            raise RewriteError("expand: keys and values have one size in this model: head_dim grows both")
        sites = [self._site(kind, program, table, name, dim) for name, dim in named.items()]
        if sites and all(site.reason for site in sites):
            others = [k for k in KINDS if k != kind and self._is_open(k, program, table)]
            able = f"; what can grow here: {', '.join(others)}" if others else ""
            raise RewriteError(f"expand: {kind} cannot grow ({sites[0].path}): {sites[0].reason}{able}")
        return [site for site in sites if site.size > site.what.size or site.reason]

    def _is_open(self, kind: str, program: Program, table: Table) -> bool:
        """Whether some dimension of a kind has nothing against it."""
        found = of_kind(table, kind)
        if self.method == "pad":
            return any(not obstacle(program, table, kind, name, dim) for name, dim in found)
        sized = ((dim, 2 * dim.size) for _, dim in found if kind in COPIED)
        return any(not copy_obstacle(program, table, kind, dim, size, self.untie) for dim, size in sized)

    def _site(self, kind: str, program: Program, table: Table, name: str, dim: Dim) -> Site:
        if self.method == "pad" and (reason := obstacle(program, table, kind, name, dim)):
            return Site(name, (kind,), dim, dim.size, reason)
        size = self._size(kind, name, dim.size, group_of(table, name))
        if self.method == "clone" and size % dim.size:
            raise RewriteError(
                f"expand: method=clone repeats units whole times, and {name} would be {size / dim.size:g} times {dim.size}: "
                "use a whole factor, or method=lemon"
            )
        reason = "" if self.method == "pad" else copy_obstacle(program, table, kind, dim, size, self.untie)
        return Site(name, (kind,), dim, size, reason)

    def _size(self, kind: str, name: str, size: int, group: int) -> int:
        """The new size; for heads in groups their number is given in query heads."""
        wanted = grown(getattr(self, kind), name, size * group, "slice" if kind == "ffn" else "random-prune")
        if wanted % group:
            near = wanted + group - wanted % group
            raise RewriteError(f"expand: {wanted} heads ({name}) are no whole groups of {group} that share keys: {near} are")
        return wanted // group


@dataclass(frozen=True)
class _Copying(_Part):
    """Channels and hidden units by copies, as Net2WiderNet does."""

    def run(self, program: Program, context: Context) -> None:
        table = analyze(program)
        copies = [Copies(site.what, site.size) for site in self.chosen(self.sites(program, table), context)]
        noise = 1.0 if self.snr is None else 10 ** (-self.snr / 20)
        copy_units(context.edit, table, copies, noise, torch.Generator().manual_seed(context.seed))

    def sites(self, program: Program, table: Table) -> list[Site]:
        """The channels; raises RewriteError where there are some and none can be copied."""
        found = []
        for name, dim in channels_of(table):
            reason = channels_obstacle(table, dim)
            size = dim.size if reason else grown(self.channels, name, dim.size)
            if reason or size > dim.size:
                found.append(Site(name, ("channels",), dim, size, reason))
        if found and all(site.reason for site in found):
            raise RewriteError(f"expand: channels cannot be copied ({found[0].path}): {found[0].reason}")
        return found


@dataclass(frozen=True)
class _Identities(_Part):
    """Identities before activations, as Net2DeeperNet does."""

    def run(self, program: Program, context: Context) -> None:
        chosen = self.chosen(self.sites(program), context)
        if chosen:
            counts = Counter(places(len(chosen), grown(self.layers, "layers", len(chosen)) - len(chosen), self.at))
            deepen_by_identities(context.edit, [(site.what, counts[i]) for i, site in enumerate(chosen)])

    def sites(self, program: Program) -> list[Site]:
        """The activations; raises RewriteError where there are some and none is idempotent."""
        found = deepenings(program)
        if found and all(site.obstacle for site in found):
            raise RewriteError(f"expand: {found[0].path} can get no layer before it: {found[0].obstacle}")
        return [Site(site.path, site.types, site, 1, site.obstacle) for site in found]


@dataclass(frozen=True)
class _Deeper(_Part):
    """Layers alone."""

    def run(self, program: Program, context: Context) -> None:
        chosen = self.chosen(self.sites(program), context)
        if chosen:
            deepen(context.edit, [(site.what, site.size) for site in chosen], self.at, self.init, context.seed)

    def sites(self, program: Program) -> list[Site]:
        """The lists of blocks; raises RewriteError where there are some and none can have more."""
        found = stacks(program) if self.layers else []
        if found and all(stack.obstacle for stack in found):
            raise RewriteError(f"expand: {found[0].path} can get no more layers: {found[0].obstacle}")
        more = [grown(self.layers, s.path, len(s.blocks), "drop-blocks") - len(s.blocks) for s in found]
        return [Site(s.path, s.types, s, n, s.obstacle) for s, n in zip(found, more, strict=True) if n]
