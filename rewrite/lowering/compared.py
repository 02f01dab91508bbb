"""A program beside a module of the user's that is to do the same: both run on the example inputs, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import nn

from rewrite.graph.program import Program
from rewrite.graph.tree import on_meta
from rewrite.numerics.compare import TOLERANCE, Difference, Mode, Run, difference, run

T = TypeVar("T")
Renamed = Callable[[str], str]
ROUNDING = 1e-5
"""The largest relative error between two float32 runs of the same operators."""


def disagreement(program: Program, made: nn.Module, renamed: Renamed = str) -> str:
    """How a module differs from a program, in words, empty where it does not: outputs, gradients and buffers in training,
    outputs and buffers in evaluation. ``renamed`` says what the module calls a tensor of the program.

    Bit for bit, or else in exact arithmetic. Without values nothing is compared.
    """
    return distance(program, made, ("train", "eval"), renamed=renamed).words


@dataclass(frozen=True)
class Distance:
    """How far a module is from a program: the largest relative error, and in words how it differs, if it does."""

    error: float = 0.0
    words: str = ""


def distance(
    program: Program, made: nn.Module, modes: Sequence[Mode], *, gradients: bool = True, renamed: Renamed = str
) -> Distance:
    """How far a module is from a program in some modes, ``gradients`` in the first of them."""
    if on_meta(made):
        return Distance()
    if any(part.kind == "training mode" for part in program.opaque):
        modes = ("eval",)
    args, kwargs = program.example_args, dict(program.example_kwargs)
    if "use_cache" in program.module.interface.signature.parameters:
        kwargs.setdefault("use_cache", False)
    both = _Both(program, made, args, kwargs, renamed)
    for mode in modes:
        gap, tolerance = both.gap(mode, gradients=gradients and mode == modes[0])
        if not gap.largest <= tolerance:
            at = f" at {gap.worst_gradient}" if gap.worst_gradient else ""
            told = f"outputs {gap.outputs:.1e}, gradients {gap.gradients:.1e}{at}, buffers {gap.buffers:.1e}"
            return Distance(gap.largest, f"in {mode} mode ({told}) {gap.problem}".rstrip())
        if not gap.modal:  # nothing that ran asked for the mode
            break
    return Distance()


@dataclass
class _Both:
    """A program and a module, run side by side; a program that does not ask for its mode is run in one."""

    program: Program
    made: nn.Module
    args: Any
    kwargs: Any
    renamed: Renamed
    runs: dict[tuple[bool, bool], Run] = field(default_factory=dict)

    def gap(self, mode: Mode, *, gradients: bool) -> tuple[Difference, float]:
        """The difference and what it may be: none in the own dtype, bit for bit, or little in exact arithmetic; in the
        own dtype where the model's code cannot run in float64 (a float64 limit in a float32 mask overflows, say).
        """
        own = self._difference(mode, exact=False, gradients=gradients)
        if own.largest == 0:
            return own, 0.0
        try:
            return self._difference(mode, exact=True, gradients=gradients), TOLERANCE
        except RuntimeError:
            return own, ROUNDING

    def _difference(self, mode: Mode, *, exact: bool, gradients: bool) -> Difference:
        ours = self.runs.get((exact, gradients))
        if ours is None or ours.modal:
            ours = self._run(self.program.module, mode, exact, gradients)
            ours = replace(ours, gradients=self._named(ours.gradients), buffers=self._named(ours.buffers))
            self.runs[exact, gradients] = ours
        return difference(ours, self._run(self.made, mode, exact, gradients))

    def _named(self, tensors: Mapping[str, T]) -> dict[str, T]:
        return {self.renamed(name): tensor for name, tensor in tensors.items()}

    def _run(self, module: nn.Module, mode: Mode, exact: bool, gradients: bool) -> Run:
        return run(module, self.args, self.kwargs, mode, exact=exact, gradients=gradients, by_layer=False)
