"""Training a rewritten model to give what the original gives: AdamW on outputs, and on the values behind the edits."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rewrite.graph.program import Program

from .checkpoint import Checkpoint, Standing
from .forward import Watching
from .least_squares import Inputs
from .losses import LossName, OutputLoss, hidden_loss
from .pairs import Pair

LOOKS = 20
"""How often the loss on what is held back is looked at, at most."""
WARM_UP = 0.05
"""The part of the steps in which the learning rate rises."""


Values = tuple[list[Any], list[torch.Tensor]]
"""Flat outputs, and values behind the edits."""


@dataclass(frozen=True)
class Options:
    """How to heal: see ``rewrite.heal``."""

    steps: int = 200
    lr: float = 5e-4
    loss: LossName = "auto"
    hidden: float = 1.0
    batch: int = 32
    patience: int = 10
    closed_form: bool = True
    seed: int = 0


@dataclass
class Training:
    """Both programs, what is compared, and the calls: those to learn from, and those held back to judge by."""

    teacher: Program
    student: Program
    pairs: Sequence[Pair]
    loss: OutputLoss
    seen: Inputs
    held: Inputs
    options: Options
    tell: Callable[[str], None]
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.student.module.parameters() if p.requires_grad]
        self._teacher = Watching(self.teacher, [pair.old for pair in self.pairs])
        self._student = Watching(self.student, [pair.new for pair in self.pairs])
        self._judges = [(self._wanted(before), after) for before, after in self.held]

    def begun(self) -> Standing:
        """Where training starts, the held-back loss with it."""
        loss = self.judged()
        return Standing(0, self._values(), self._values(), loss, loss, {})

    def run(self, standing: Standing, checkpoint: Checkpoint) -> Standing:
        """Go on from ``standing`` to the last step, or until nothing gets better; leave the best values in the program."""
        optimizer = torch.optim.AdamW(self.parameters, lr=self.options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.put(standing.tensors)
        if standing.optimizer:
            optimizer.load_state_dict(standing.optimizer)
        began, start = time.monotonic(), standing.step
        while standing.step < self.options.steps and standing.stale < self.options.patience:
            self._step(standing.step, optimizer)
            standing.step += 1
            if standing.step % self.every == 0 or standing.step == self.options.steps:
                self._look(standing, optimizer)
                checkpoint.write(standing)
            left = (self.options.steps - standing.step) * (time.monotonic() - began) / (standing.step - start)
            done = f"step {standing.step} of {self.options.steps}"
            self.tell(f"healing: {done}, loss {standing.least:.4g} (at first {standing.first:.4g}), {_time(left)} left")
        self.put(standing.best)
        return standing

    @property
    def every(self) -> int:
        """How many steps lie between two looks: a look is as dear as some steps."""
        return max(5, self.options.steps // LOOKS)

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.options.lr * _rate(step, self.options.steps)
        optimizer.zero_grad()
        before, after = self.seen[_turn(step, len(self.seen), self.options.seed)]
        self._distance(self._wanted(before), after).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()

    def _look(self, standing: Standing, optimizer: torch.optim.Optimizer) -> None:
        loss = self.judged()
        standing.stale = 0 if loss < standing.least else standing.stale + 1
        if loss < standing.least:
            standing.least, standing.best = loss, self._values()
        standing.tensors, standing.optimizer = self._values(), copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def judged(self) -> float:
        """The loss on what is held back."""
        return sum(float(self._distance(*judge)) for judge in self._judges) / len(self.held)

    @torch.no_grad()
    def gaps(self) -> tuple[float, list[float]]:
        """On what is held back: the distance of the outputs, and the relative error at each pair."""
        totals = torch.zeros(1 + len(self.pairs))
        for judge in self._judges:
            output, hidden = self._compared(*judge)
            totals += torch.stack([output, *(hidden_loss([a], [b]).sqrt() for a, b in hidden)]).cpu() / len(self.held)
        return float(totals[0]), totals[1:].tolist()

    @torch.no_grad()
    def _wanted(self, inputs: list[Any]) -> Values:
        """What the original gives: its outputs, and its values behind the edits."""
        return self._teacher.values(inputs)

    def _distance(self, wanted: Values, inputs: list[Any]) -> torch.Tensor:
        output, hidden = self._compared(wanted, inputs)
        if not hidden or not self.options.hidden:
            return output
        return output + self.options.hidden * hidden_loss(*zip(*hidden, strict=True))

    def _compared(self, wanted: Values, inputs: list[Any]) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        outputs, values = self._student.values(inputs)
        return self.loss(outputs, wanted[0]), [*zip(values, wanted[1], strict=True)]

    def _values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def put(self, values: Sequence[torch.Tensor]) -> None:
        """Give the program's trained parameters these values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def _rate(step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to nothing."""
    rise = max(1, int(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def _turn(step: int, calls: int, seed: int) -> int:
    """The number of the call that is learned from at a step: each epoch all, in an order of its own."""
    epoch, place = divmod(step, calls)
    order = torch.randperm(calls, generator=torch.Generator().manual_seed(seed + epoch))
    return int(order[place])


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
