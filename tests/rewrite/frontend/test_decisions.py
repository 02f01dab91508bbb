"""Branches that integers of the inputs decide: the example's answer is taken, said, and asserted of other inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError, capture
from rewrite.graph.program import Program

Question = Callable[[Tensor, nn.Module], bool]


class Masked(nn.Module):
    """Does more where a mask, or a number of its own, says so."""

    steps: Tensor

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.question = question
        self.register_buffer("steps", torch.tensor([3, 1]), persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x)
        return y.sin() if self.question(mask, self) else y


def overwritten(mask: Tensor, model: nn.Module) -> bool:
    kept = (1 - mask) * 7
    before = kept * 2
    kept[kept == 7] = -1
    view = kept[:, 1:]
    view += 1
    return bool(before.max() == 14) and bool((before > 0).any())


def seen_through_a_view(mask: Tensor, model: nn.Module) -> bool:
    kept = mask * 1
    view = kept[:, 1:]
    view += 1
    return bool(kept.max() == 2)


QUESTIONS: dict[str, Question] = {
    "any": lambda mask, model: bool((mask == 0).any()),
    "item": lambda mask, model: mask.flatten().min().item() == 0,
    "number": lambda mask, model: int(mask.sum()) < 10,
    "list": lambda mask, model: mask.sum(1).tolist()[1] == 3,
    "rows": lambda mask, model: any(int(row.sum()) == 3 for row in mask),
    "buffer": lambda mask, model: int(model.steps[0] - 1) == 2,
    "size": lambda mask, model: len(torch.zeros(mask.sum(1).min())) == 3,
    "written": overwritten,
}
X = torch.randn(2, 5, 4)
PADDED = torch.ones(2, 5, dtype=torch.long)
PADDED[1, 3:] = 0


def asserts(program: Program) -> list[str]:
    return [str(n.args[1]) for n in program.graph.nodes if n.target is torch.ops.aten._assert_async.msg]


@pytest.mark.parametrize("kind", QUESTIONS)
def test_the_examples_answer_is_taken_and_asserted(kind: str) -> None:
    model = Masked(QUESTIONS[kind])
    program = capture(model, (X, PADDED))
    assert torch.equal(program.module(X, PADDED), model(X, PADDED))
    assert torch.equal(program.module(X, PADDED), model.linear(X).sin()), "the example's answer is yes"
    assert asserts(program)
    assert all("test_decisions.py:" in note for note in program.origin.notes)
    assert "the inputs' values decide" in program.origin.notes[0]


def test_other_inputs_are_refused_where_they_decide_otherwise() -> None:
    model = Masked(QUESTIONS["any"])
    program = capture(model, (X, PADDED))
    x, mask = torch.randn(3, 7, 4), torch.zeros(3, 7, dtype=torch.long)
    assert torch.equal(program.module(x, mask), model(x, mask)), "other sizes and values, the same answer"
    with pytest.raises(RuntimeError, match=r"as the example inputs do: True at .*test_decisions\.py:.*capture the model"):
        program.module(X, torch.ones_like(PADDED))


def test_what_shares_memory_with_a_write_is_not_known_any_more() -> None:
    with pytest.raises(RewriteError, match="data-dependent"):
        capture(Masked(seen_through_a_view), (X, PADDED))


def test_an_assertion_goes_through_passes_files_and_backends(tmp_path: Path) -> None:
    model = Masked(QUESTIONS["any"]).eval()
    program = capture(model, (X, PADDED))
    rewrite.save(rewrite.apply(program, "merge-linears"), tmp_path / "masked.pt2")
    again = rewrite.load(tmp_path / "masked.pt2")
    assert asserts(again) == asserts(program)
    assert rewrite.verify(program, again)
    assert torch.equal(rewrite.lower(again, "eager")(X, PADDED), model(X, PADDED))
    torch.testing.assert_close(rewrite.lower(again, "onnxruntime")(X, PADDED), model(X, PADDED))
