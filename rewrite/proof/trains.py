"""Whether a program still trains: nothing may be written over that autograd keeps for the backward."""

from __future__ import annotations

from collections.abc import Iterator

from rewrite.analysis.writes import Writes
from rewrite.errors import first_line
from rewrite.graph.history import Check
from rewrite.graph.program import Program
from rewrite.numerics.compare import run

from .contract import Contract


def trains(before: Program, after: Program, contract: Contract, seed: int) -> Iterator[Check]:
    """One step of the program after, as a whole: parts that are held alone do not see who else keeps what they write into.

    It is asked where something is written in place at all, and where the program before trains.
    """
    if contract.evaluation_only or not Writes(after.graph, after.module).writes:
        return
    problem = _problem(after, seed)
    if not problem:
        yield Check("trains", True, "a step of training, on the example")
    elif not _problem(before, seed):
        yield Check("trains", False, f"a step of training fails where it did not before: {problem}")


def _problem(program: Program, seed: int) -> str:
    try:
        run(program.module, program.example_args, program.example_kwargs, "train", exact=False, seed=seed)
    except Exception as error:  # what a model's own code raises is without end
        return first_line(error)
    return ""
