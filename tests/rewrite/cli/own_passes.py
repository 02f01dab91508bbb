"""Passes for the tests of the command line alone: each goes wrong in its own way, or finds nothing to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rewrite.pipeline.pass_ import Pass
from rewrite.proof.contract import SAME, Contract


@dataclass(frozen=True)
class Liar(Pass):
    """Promise that nothing changes, and double a weight."""

    name = "liar"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        path, weight = next(iter(program.module.named_parameters()))
        context.edit.set_parameter(path, 2 * weight)


@dataclass(frozen=True)
class Picky(Pass):
    """Find every layer too plain to change."""

    name = "picky"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        for node, layer in program.layers():
            context.skip(str(node.target), f"a {type(layer).__name__} is too plain")
        context.warn("nothing here is worth it")


@dataclass(frozen=True)
class Broken(Pass):
    """Fail in a way that nobody foresaw."""

    name = "broken"

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME)

    def run(self, program: Any, context: Any) -> None:
        raise ZeroDivisionError("not foreseen")


@dataclass(frozen=True)
class Interrupted(Broken):
    """Stand for a user who presses Ctrl-C."""

    name = "interrupted"

    def run(self, program: Any, context: Any) -> None:
        raise KeyboardInterrupt
