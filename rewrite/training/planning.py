"""Choosing for each saved storage whether it is kept, computed again or compressed: a knapsack, by integer programming.

Least time within the budget without any loss; where that cannot be, least noise in the gradient first, then least time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rewrite.errors import RewriteError

from .groups import grouped_bytes
from .inventory import Item
from .packing import packed_bytes

LOSSY = (8, 4)
KEEP, RECOMPUTE, MASK, MOVE = "keep", "recompute", "1 bit", "offload"
FRONTIER = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Of what eager keeps: the budgets of a frontier."""
_SECONDS = 20.0
_SLACK = 1.01


@dataclass(frozen=True)
class Again:
    """A layer or a block that can be computed again: its seconds, the bytes of inputs that a block keeps for that, and how
    many numbers of ``size`` bytes are among them which can be compressed.
    """

    path: str
    seconds: float
    bytes: int = 0
    numbers: int = 0
    size: int = 4


@dataclass(frozen=True)
class Costs:
    """Seconds to compress and restore a number, by bits, to pack a mask, to move a byte; each item's noise at 1 bit."""

    packing: Mapping[int, float]
    masking: float
    moving: float | None
    noise: Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Task:
    """What there is to choose: storages, layers by path, blocks, and for an item's node the block around it."""

    items: Sequence[Item]
    layers: Mapping[str, Again]
    blocks: Mapping[str, Again]
    block_of: Mapping[str, str]
    costs: Costs
    group: int
    min_size: int


@dataclass(frozen=True)
class Plan:
    """What was chosen for each item, which layers and blocks are computed again (with what each block's inputs are kept as),
    and what that comes to.
    """

    choices: Sequence[str]
    layers: Sequence[str]
    blocks: Mapping[str, str]
    bytes: int
    seconds: float
    noise: float


def planned(task: Task, budget: int, *, lossy: bool = True) -> Plan:
    """The best plan of at most ``budget`` bytes. Raises RewriteError, with the smallest that can be reached, for less."""
    model = _Model.of(task)
    found = model.solved(model.seconds, [(model.bytes, budget)], lossless=True)
    if found is None and lossy and model.noise.any():
        scaled = model.noise / model.noise.max()
        least = model.solved(scaled, [(model.bytes, budget)])
        if least is not None:
            most = float(scaled @ least) * _SLACK + 1e-12
            found = model.solved(model.seconds, [(model.bytes, budget), (scaled, most)])
            found = least if found is None else found
    if found is None:
        smallest = model.solved(model.bytes, [], lossless=not lossy)
        least_bytes = int(model.bytes @ smallest) if smallest is not None else sum(item.bytes for item in task.items)
        share = least_bytes / max(sum(item.bytes for item in task.items), 1)
        raise RewriteError(
            f"a budget of {budget:,} bytes cannot be met: the smallest is {least_bytes:,} bytes, {share:.3f} of eager"
        )
    return model.plan(found)


def frontier(task: Task) -> list[Plan]:
    """The best plans of ever smaller budgets, as far as they can be met: lossy ones only where noise was measured."""
    eager = sum(item.bytes for item in task.items)
    found: list[Plan] = []
    for share in FRONTIER:
        try:
            plan = planned(task, int(share * eager), lossy=bool(task.costs.noise))
        except RewriteError:
            break
        if not found or plan.bytes < found[-1].bytes:
            found.append(plan)
    return found


@dataclass
class _Model:
    """The columns of the program: for each choice what it costs; rows that hold them together."""

    task: Task
    names: list[tuple[str, object]] = field(default_factory=list)
    columns: list[tuple[float, float, float, bool]] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task) -> _Model:
        """A choice for each item, one for each layer and block."""
        model = cls(task)
        model.layer_columns = {p: model._add(("layer", p), a.bytes, a.seconds) for p, a in task.layers.items()}
        model.block_columns = {p: model._add(("block", p), 0, a.seconds) for p, a in task.blocks.items()}
        for path, block in task.blocks.items():
            model._inputs(path, block)
        for number, item in enumerate(task.items):
            model._choices(number, item)
        return model

    layer_columns: dict[str, int] = field(default_factory=dict)
    block_columns: dict[str, int] = field(default_factory=dict)

    def _inputs(self, path: str, block: Again) -> None:
        """How a block's inputs are kept, if it is computed again: their rounding disturbs all that it keeps."""
        made = [self._add(("input", (path, KEEP)), block.bytes, 0.0)]
        noise = sum(
            self.task.costs.noise.get(i.key, 0.0) for i in self.task.items if self.task.block_of.get(i.keeper) == path
        )
        for bits in LOSSY if block.numbers else ():
            packed = grouped_bytes(block.numbers, bits, self.task.group, _wide(block.size))
            kept, seconds = block.bytes - block.numbers * block.size + packed, self.task.costs.packing[bits] * block.numbers
            made.append(self._add(("input", (path, f"{bits} bits")), kept, seconds, noise / (2**bits - 1) ** 2, lossy=True))
        self.rows.append(({**dict.fromkeys(made, 1.0), self.block_columns[path]: -1.0}, 0.0, 0.0))

    def _choices(self, number: int, item: Item) -> None:
        made = [self._add((KEEP, number), item.bytes, 0.0)]
        large = item.numbers >= self.task.min_size
        costs = self.task.costs
        if item.is_mask and large:
            made.append(self._add((MASK, number), packed_bytes(item.numbers, 1), costs.masking * item.numbers))
        if item.is_rounded and large:
            for bits in LOSSY:
                size = item.bytes // max(item.numbers, 1)
                kept = grouped_bytes(item.numbers, bits, self.task.group, _wide(size))
                noise = costs.noise.get(item.key, 0.0) / (2**bits - 1) ** 2
                made.append(self._add((f"{bits} bits", number), kept, costs.packing[bits] * item.numbers, noise, lossy=True))
        if costs.moving is not None and large and item.is_rounded:
            made.append(self._add((MOVE, number), 0, costs.moving * item.bytes))
        if item.maker in self.layer_columns:
            made.append(self._add((RECOMPUTE, number), 0, 0.0))
            self.rows.append(({made[-1]: 1.0, self.layer_columns[item.maker]: -1.0}, -np.inf, 0.0))
        block = self.task.block_of.get(item.keeper)
        if block in self.block_columns:
            made.append(self._add((RECOMPUTE, number), 0, 0.0))
            self.rows.append(({made[-1]: 1.0, self.block_columns[block]: -1.0}, 0.0, 0.0))
        self.rows.append((dict.fromkeys(made, 1.0), 1.0, 1.0))

    def _add(self, name: tuple[str, object], bytes_: float, seconds: float, noise: float = 0.0, lossy: bool = False) -> int:
        self.names.append(name)
        self.columns.append((float(bytes_), seconds, noise, lossy))
        return len(self.names) - 1

    @property
    def bytes(self) -> np.ndarray:
        return np.array([column[0] for column in self.columns])

    @property
    def seconds(self) -> np.ndarray:
        return np.array([column[1] for column in self.columns])

    @property
    def noise(self) -> np.ndarray:
        return np.array([column[2] for column in self.columns])

    def solved(
        self, cost: np.ndarray, limits: Iterable[tuple[np.ndarray, float]], *, lossless: bool = False
    ) -> np.ndarray | None:
        """The choice that costs least, ties by bytes; None where there is none."""
        rows = [*self.rows, *(({i: v for i, v in enumerate(row) if v}, -np.inf, top) for row, top in limits)]
        places = [(r, c, v) for r, (row, _, _) in enumerate(rows) for c, v in row.items()]
        row, column, value = zip(*places, strict=True)
        indices = np.array([row, column], dtype=np.int32)  # the oldest scipy's solver takes no longer ones
        matrix = csr_array((value, tuple(indices)), shape=(len(rows), len(self.columns)))
        constraint = LinearConstraint(matrix, [low for _, low, _ in rows], [high for _, _, high in rows])
        highest = np.array([0.0 if lossless and column[3] else 1.0 for column in self.columns])
        scale = max(float(np.abs(cost).max()), 1e-30)
        ties = 1e-7 * self.bytes / max(float(self.bytes.max()), 1.0)
        found = milp(
            cost / scale + ties,
            constraints=constraint,
            integrality=np.ones(len(self.columns)),
            bounds=Bounds(np.zeros(len(self.columns)), highest),
            options={"time_limit": _SECONDS, "mip_rel_gap": 1e-4},
        )
        return None if found.x is None else np.round(found.x)

    def plan(self, chosen: np.ndarray) -> Plan:
        """The plan that a solution stands for; a layer that no item needs is left out."""
        picked = [name for name, value in zip(self.names, chosen, strict=True) if value]
        choices = {number: name for name, number in picked if name not in ("layer", "block", "input")}
        ordered = [choices[number] for number in range(len(self.task.items))]
        return Plan(
            ordered,
            [str(path) for name, path in picked if name == "layer"],
            dict(of for name, of in picked if name == "input" and isinstance(of, tuple)),
            int(self.bytes @ chosen),
            float(self.seconds @ chosen),
            float(self.noise @ chosen),
        )


def _wide(size: int) -> torch.dtype:
    return torch.float64 if size == 8 else torch.float32 if size == 4 else torch.bfloat16
