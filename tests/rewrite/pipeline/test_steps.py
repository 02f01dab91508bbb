"""Passes made of passes: each step is run, proven and recorded by its own contract, here, in a file, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from rewrite import CLOSE, NEW, SAME, Contract, Pass, Program, RewriteError, VerificationError, apply, load, save
from rewrite.cli.render import records_table
from rewrite.graph.history import Record
from rewrite.pipeline.context import Context
from rewrite.pipeline.pass_ import option
from rewrite.pipeline.registry import get_pass
from rewrite.testing import check_pass

X = torch.randn(3, 8)


@dataclass(frozen=True)
class TanhGelu(Pass):
    """GELU by its approximation with tanh: y = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))."""

    name = "tanh-gelu"
    off: float = option(0.0, "by how much the formula is wrong")

    def contract(self) -> Contract:
        return Contract(forward=CLOSE, backward=NEW)

    def run(self, program: Program, context: Context) -> None:
        for node, layer in list(program.layers()):
            if isinstance(layer, nn.GELU) and layer.approximate == "none":
                context.edit.replace_layer(str(node.target), nn.GELU("tanh"))

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) + self.off


@dataclass(frozen=True)
class FastFFN(Pass):
    """Both projections of a gated FFN in one, and the cheap GELU."""

    name = "fast-ffn"
    off: float = option(0.0, "by how much the formula is wrong")
    promise: str = option("close", "what the whole promises")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=SAME) if self.promise == "same" else Contract(forward=CLOSE, backward=NEW)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        if not any(isinstance(layer, nn.GELU) for _, layer in program.layers()):
            context.skip("ffn", "it has no GELU")
            return ()
        return [TanhGelu(off=self.off), get_pass("merge-linears")()]


class FFN(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def test_each_step_has_its_own_record_and_proof() -> None:
    program = apply(FFN(nn.GELU()), [FastFFN()], args=(X,))
    (record,) = program.history
    assert [(s.text, s.contract) for s in record.steps] == [
        ("tanh-gelu", "forward close, backward new"),
        ("merge-linears", "forward same, backward same"),
    ]
    assert record.changes == record.steps[0].changes + record.steps[1].changes
    assert record.verification is not None
    names = [check.name for check in record.verification.checks]
    assert "tanh-gelu: close" in names
    assert "merge-linears: same" in names
    assert "gate_up.weight" in program.module.state_dict()


def test_a_file_keeps_the_steps(tmp_path: Path) -> None:
    program = apply(FFN(nn.GELU()), [FastFFN()], args=(X,))
    assert load(save(program, tmp_path / "fast.pt2")).history == program.history
    assert Record.from_json(program.history[0].to_json()) == program.history[0]


def test_the_terminal_shows_each_step() -> None:
    program = apply(FFN(nn.GELU()), [FastFFN()], args=(X,))
    console = Console(record=True, width=160)
    console.print(records_table(program.history))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line for line in lines if line[:1] == ["step"]] == [
        ["step", "1", "tanh-gelu"],
        ["step", "2", "merge-linears"],
    ]
    assert sum(line[:1] == ["proven"] for line in lines) == 2


@pytest.mark.parametrize("kind", [Path, str])
def test_a_step_that_breaks_its_word_is_named_and_nothing_is_changed(tmp_path: Path, kind: type) -> None:
    with pytest.raises(VerificationError, match=r"pass tanh-gelu\{off=1.0\} broke its contract .*formula"):
        apply(FFN(nn.GELU()), [FastFFN(off=1.0)], args=(X,), crash_folder=kind(tmp_path))
    assert list(tmp_path.iterdir())


def test_a_step_may_not_promise_less_than_the_whole() -> None:
    with pytest.raises(
        RewriteError, match=r"fast-ffn\{promise=same\} promises forward same, .* tanh-gelu only forward close"
    ):
        apply(FFN(nn.GELU()), [FastFFN(promise="same")], args=(X,))


def test_without_steps_nothing_changes_and_the_reason_is_told() -> None:
    (record,) = apply(FFN(nn.ReLU()), [FastFFN()], args=(X,)).history
    assert not record.changed
    assert [(skip.path, skip.reason) for skip in record.skipped] == [("ffn", "it has no GELU")]


def test_it_passes_the_kit() -> None:
    check_pass(FastFFN(), FFN(nn.GELU()), (X,), changes=9)


@pytest.mark.parametrize(
    ("whole", "step", "covered"),
    [
        (Contract(CLOSE, NEW), Contract(SAME, SAME), True),
        (Contract(SAME, SAME), Contract(CLOSE, NEW), False),
        (Contract(NEW, NEW), Contract(SAME, SAME, evaluation_only=True), False),
        (Contract(NEW, NEW, evaluation_only=True), Contract(SAME, SAME), True),
    ],
)
def test_which_promise_covers_which(whole: Contract, step: Contract, covered: bool) -> None:
    assert whole.covers(step) is covered
