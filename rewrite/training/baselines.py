"""A step of training in several ways, side by side: what it keeps, the peak of its memory, how long it takes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.tree import on_meta
from rewrite.torch_private import compiled_within, pytree

from .places import places
from .saved import kept_bytes

BUDGET = 0.5
"""Of ``activation_memory_budget``, which tells the compiler how much it may keep."""
ROUNDS = 3
Clock = Callable[[], float]


@dataclass(frozen=True)
class Way:
    """One way of training: bytes kept for the backward, growth of memory in a step at its peak, seconds of a step.

    ``problem`` says why it could not be measured; then all are 0.
    """

    name: str
    bytes: int = 0
    peak: int = 0
    seconds: float = 0.0
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Ways:
    """Several ways of training a model, the first of them as it is."""

    rows: tuple[Way, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Everything as plain JSON values."""
        return [row.to_json() for row in self.rows]


def compared(
    program: Program, after: Program | None = None, *, compiled: bool = True, seed: int = 0, clock: Clock = time.perf_counter
) -> Ways:
    """The program as it is, with each block under ``torch.utils.checkpoint``, compiled, compiled with half the memory; and
    ``after`` passes, eager, compiled, and compiled with half the memory.

    A step is one forward in training and the gradient of all parameters, on the example inputs. Raises RewriteError for a
    program on the meta device.
    """
    if on_meta(program.module):
        raise RewriteError("the program is on the meta device: there is nothing to measure")
    runs: dict[str, tuple[Program, float | None]] = {
        "eager": (program, None),
        "checkpoint per block": (checkpointed_blocks(program), None),
    }
    if compiled:
        runs["torch.compile"] = (program, 1.0)
        runs[f"torch.compile, budget {BUDGET}"] = (program, BUDGET)
    if after is not None:
        runs["passes"] = (after, None)
        if compiled:
            runs["passes, torch.compile"] = (after, 1.0)
            runs[f"passes, torch.compile, budget {BUDGET}"] = (after, BUDGET)
    return Ways(tuple(way_of(name, each, budget, seed, clock) for name, (each, budget) in runs.items()))


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """How far memory grows during ``run`` beyond what was there, in bytes, by what the allocator says."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with _without_notes(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """The profiler's library notes on the error stream that it begins and ends; nothing asks it not to."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def checkpointed_blocks(program: Program) -> Program:
    """The program with what blocks keep computed again, each block as a whole."""
    blocks = [p.path for p in places(program) if not p.is_layer and p.is_standard and not p.obstacle]
    outer = [path for path in blocks if not any(path.startswith(f"{other}.") for other in blocks)]
    made = program.clone(share=True)
    made.module.assume({"recompute": {"outputs": [], "regions": outer}})
    return made


def way_of(name: str, program: Program, budget: float | None = None, seed: int = 0, clock: Clock = time.perf_counter) -> Way:
    """One way: a program in eager mode, or compiled within ``budget`` of what the compiler would keep."""
    module = program.clone().module.train()
    step = _Step(module, (program.example_args, program.example_kwargs), seed)
    context: AbstractContextManager[Any] = nullcontext() if budget is None else compiled_within(budget)
    with torch.random.fork_rng(), torch.enable_grad(), context:
        if budget is not None:
            torch.compiler.reset()
            step.call = torch.compile(module)
        try:
            step()
            kept = kept_bytes(module, step.arguments, step.call)
            seconds = []
            for _ in range(ROUNDS):
                began = clock()
                step()
                seconds.append(clock() - began)
            return Way(name, kept, peak_of(step, step.device), sorted(seconds)[ROUNDS // 2])
        except Exception as error:  # a compiler that fails on a model is a row that says so
            return Way(name, problem=named_line(error))


@dataclass
class _Step:
    """One forward and the gradient of all parameters."""

    module: LayerGraph
    given: tuple[tuple[Any, ...], Mapping[str, Any]]
    seed: int
    call: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(self.given[0]), dict(self.given[1])))
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.call = self.module
        self.device = next((p.device for p in self.trained), torch.device("cpu"))

    def __call__(self) -> None:
        torch.manual_seed(self.seed)
        outputs = self.call(*self.arguments[0], **self.arguments[1])
        losses = list(_losses(outputs))
        if losses and self.trained:
            torch.autograd.grad(torch.stack(losses).sum(), self.trained, allow_unused=True)


def _losses(outputs: Any) -> Iterator[torch.Tensor]:
    for output in pytree.tree_leaves(outputs):
        if isinstance(output, torch.Tensor) and output.requires_grad:
            yield output.float().square().mean()
