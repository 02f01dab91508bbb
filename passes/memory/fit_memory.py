"""Fit what autograd keeps into a budget: what to compute again, to compress and to keep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rewrite.analysis.carry import sizes
from rewrite.analysis.costs import flops
from rewrite.analysis.observe import first_inputs, home
from rewrite.errors import OptionError, RewriteError
from rewrite.graph.module_calls import module_calls
from rewrite.graph.nodes import tensor_value
from rewrite.graph.tree import on_meta
from rewrite.pipeline.pass_ import Pass, option
from rewrite.proof.contract import ESTIMATE, SAME, Contract
from rewrite.training.inventory import Item, by_key, inventory
from rewrite.training.packer import MOVED
from rewrite.training.places import Place, adding, places
from rewrite.training.planning import KEEP, LOSSY, MASK, MOVE, Again, Costs, Plan, Task, frontier, planned
from rewrite.training.rates import Rates, rates
from rewrite.training.saved import memory
from rewrite.training.sensitivity import sensitivities

if TYPE_CHECKING:
    from torch.fx import Node

    from rewrite.graph.program import Program
    from rewrite.pipeline.context import Context

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TRIES = 6
_GROUP = 256


@dataclass(frozen=True)
class FitMemory(Pass):
    """Keep at most ``budget`` for the backward: saved tensors stay, are computed again, compressed, or wait on the host.

    The budget is a fraction of what eager keeps (0.25) or bytes (4GiB). Least time without loss comes first: blocks, norms
    and activations computed again, masks in one bit, on a GPU tensors moved to the host. Where that does not reach, tensors
    are compressed so that the gradient gets least noise (those that blocks are computed again from too: their rounding
    counts for all that the block keeps), and of such plans the fastest is taken: an integer program, with rates measured on
    this machine and the noise of each tensor measured by a few backward passes (on the data's first call, or the example
    inputs). What the plan comes to is measured, and the plan made anew while it is over. The report has a row for each
    tensor, and one for the best plan of each of several sizes: the frontier, which ``rewrite memory --picture`` draws. A
    budget that cannot be met is refused, with the smallest that can.

    The forward is the same bit for bit, and so is the gradient where nothing had to be compressed.

    Source: Beaumont et al., "Efficient Combination of Rematerialization and Offloading for Training DNNs", NeurIPS 2021,
    has the same trade without compression; the noise is that of GACT (arXiv 2206.11357).
    """

    name = "fit-memory"
    budget: str = option("0.25", "a fraction of what eager keeps, or bytes: 4GiB, 300MB")
    lossy: bool = option(True, "whether tensors may be compressed where nothing else reaches")
    min_size: int = option(4096, "fewest numbers of a tensor that is compressed", at_least=1, at_most=2**30)

    def __post_init__(self) -> None:
        if isinstance(self.budget, int | float):
            object.__setattr__(self, "budget", str(self.budget))
        super().__post_init__()
        if _bytes(self.budget, 1000) is None:
            raise OptionError(f"option 'budget' of pass '{self.name}' is 0.25 or 4GiB, not {self.budget!r}", "budget")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=ESTIMATE, bound=1.0, cosine=0.7)

    def run(self, program: Program, context: Context) -> None:
        if not any(p.requires_grad for p in program.module.parameters()):
            return
        if on_meta(program.module):
            raise RewriteError(f"{self.text}: the program is on the meta device: there is nothing to measure")
        given = program.properties
        if "recompute" in given or "saved_tensors" in given:
            context.skip("the program", "what it keeps is planned already")
            return
        eager = memory(program, seed=context.seed).bytes
        budget = _bytes(self.budget, eager)
        assert budget is not None
        if eager <= budget:
            context.skip("the program", f"it keeps {eager:,} bytes, within the budget of {budget:,}")
            return
        context.listener("planning")
        task, found = self._task(program, context)
        target = budget
        for _ in range(_TRIES):
            task, plan = self._plan(program, context, task, target)
            self._carry_out(program, context, task, found, plan)
            reached = memory(program, seed=context.seed).bytes
            if reached <= budget:
                break
            target -= max(reached - budget, budget // 50)
        else:
            raise RewriteError(
                f"{self.text}: the best plan that was found keeps {reached:,} bytes, {reached / eager:.3f} of eager"
            )
        for item, choice in zip(task.items, plan.choices, strict=True):
            named = f"{choice}: {item.obstacle}" if choice == KEEP and item.obstacle else choice
            operator = "" if item.keeper == item.path.replace(".", "_") else item.keeper
            context.measure(item.path or "(the model)", tensor=operator, bytes=item.bytes, choice=named)
        for path, choice in plan.blocks.items():
            context.measure(path, tensor="what it is given", bytes=task.blocks[path].bytes, choice=choice)
        told = f"{reached:,} bytes, {reached / eager:.3f} of eager, {plan.seconds * 1e3:.2f} ms more"
        context.measure("in all", tensor="", bytes=eager, choice=told)
        for each in frontier(task):
            figures = {"kept": each.bytes / eager, "seconds": each.seconds, "noise": each.noise}
            context.measure("frontier", bytes=each.bytes, **figures)

    def _task(self, program: Program, context: Context) -> tuple[Task, Mapping[str, Place]]:
        items = inventory(program, context.seed)
        found = {place.path: place for place in places(program) if place.is_standard and not place.obstacle}
        known = rates(home(program.module))
        nodes = {str(node.target): node for node, _ in program.layers()}
        layers = {p: Again(p, _seconds(program, [nodes[p]], known)) for p, place in found.items() if place.is_layer}
        blocks, around = _blocks(
            program, [place.path for place in found.values() if not place.is_layer], known, self.min_size
        )
        costs = Costs(known.packing, known.masking, known.moving, {})
        return Task(items, layers, blocks, around, costs, _GROUP, self.min_size), found

    def _plan(self, program: Program, context: Context, task: Task, target: int) -> tuple[Task, Plan]:
        """The best plan without loss; if there is none, noise is measured, and the best with least of it is taken."""
        try:
            return task, planned(task, target, lossy=False)
        except RewriteError:
            if not self.lossy:
                raise
        if not task.costs.noise:
            task = replace(task, costs=replace(task.costs, noise=self._noise(program, context, task.items)))
        return task, planned(task, target)

    def _noise(self, program: Program, context: Context, items: Sequence[Item]) -> Mapping[tuple[str, int], float]:
        """What each tensor's rounding adds to the gradient's variance, at 1 bit."""
        found = sensitivities(program, first_inputs(program, context.data), self.min_size, context.seed)
        rounded = [item for item in items if item.is_rounded]
        return {item.key: each.cost for item, each in zip(rounded, found, strict=True)}

    def _carry_out(self, program: Program, context: Context, task: Task, found: Mapping[str, Place], plan: Plan) -> None:
        """Set the properties that a plan stands for."""
        again = [found[path] for path in (*plan.blocks, *plan.layers)]
        if again or "recompute" in program.properties:
            context.edit.set_property("recompute", adding(None, again) if again else None)
        bits = {MOVE: MOVED, **{f"{each} bits": each for each in LOSSY}}
        chosen = {item.key: bits[c] for item, c in zip(task.items, plan.choices, strict=True) if c in bits}
        now = inventory(program, context.seed)
        regions = {f"region {path}": bits[choice] for path, choice in plan.blocks.items() if choice in bits}
        chosen |= {item.key: regions[item.keeper] for item in now if item.keeper in regions and item.is_rounded}
        value: dict[str, Any] = {"group": _GROUP, "rounding": "stochastic", "min_size": self.min_size}
        value["bits"] = by_key(now, chosen)
        wanted = bool(chosen) or MASK in plan.choices
        if wanted or "saved_tensors" in program.properties:
            context.edit.set_property("saved_tensors", value if wanted else None)


def _bytes(text: str, eager: int) -> int | None:
    """A budget in bytes; None for what is none."""
    parts = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMG]i?B|B|)", text.strip())
    if parts is None:
        return None
    number, unit = float(parts[1]), parts[2]
    if not unit:
        return int(number * eager) if 0 < number <= 1 else None
    return int(number * _UNITS[unit])


def _seconds(program: Program, nodes: Sequence[Node], known: Rates) -> float:
    """What some nodes take, by their products and by the bytes of their values."""
    total = 0.0
    for node in nodes:
        values = [tensor_value(n) for n in (node, *node.all_input_nodes)]
        count = sum(
            _count(n) * v.itemsize for n, v in zip((node, *node.all_input_nodes), values, strict=True) if v is not None
        )
        total += flops(program, node) * known.flop + count * known.byte
    return total


def _count(node: Node) -> int:
    found = 1
    for size in sizes(node) or [0]:
        found *= size
    return found


def _blocks(program: Program, paths: Sequence[str], known: Rates, min_size: int) -> tuple[dict[str, Again], dict[str, str]]:
    """The outermost blocks, with what computing them again costs, and for each node the block around it."""
    outer = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    blocks: dict[str, Again] = {}
    around: dict[str, str] = {}
    for path in outer:
        calls = module_calls(program.graph, path)
        seconds = sum(_seconds(program, call.nodes, known) for call in calls)
        given = {n for call in calls for n in call.sources}
        values = [(_count(n), v) for n in given if (v := tensor_value(n)) is not None and n.op != "placeholder"]
        kept = sum(count * v.itemsize for count, v in values)
        large = [(count, v) for count, v in values if v.is_floating_point() and count >= min_size]
        size = large[0][1].itemsize if large else 4
        numbers = sum(count for count, v in large if v.itemsize == size)
        blocks[path] = Again(path, seconds, kept, numbers, size)
        around.update((node.name, path) for call in calls for node in call.nodes)
    return blocks, around
