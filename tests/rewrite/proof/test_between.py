"""Two programs that no pass connects, and the command that holds two models to a promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import rewrite
from rewrite import CLOSE, NEW, SAME, Contract, RewriteError
from rewrite.cli.commands import app
from tests.captures import capture

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def model(approximate: str = "none") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate=approximate), nn.Linear(8, 2))


def other_weights() -> nn.Module:
    made = copy.deepcopy(model())
    with torch.no_grad():
        made[2].weight.mul_(1.001)
    return made


def test_captured_twice_is_the_same() -> None:
    assert rewrite.prove(capture(model(), (X,)), capture(model(), (X,))).passed


def test_a_gradient_that_differs_is_told_from_a_forward_that_does() -> None:
    first, second = (capture(made, (X,)) for made in (model(), other_weights()))
    found = rewrite.prove(first, second)
    assert [check.name for check in found.failures] == ["same"]


def test_close_within_a_bound() -> None:
    first, second = (capture(model(kind), (X,)) for kind in ("none", "tanh"))
    assert not rewrite.prove(first, second).passed
    assert rewrite.prove(first, second, contract=Contract(CLOSE, NEW, bound=0.01)).passed
    assert not rewrite.prove(first, second, contract=Contract(CLOSE, NEW, bound=1e-7)).passed


def test_what_only_a_pass_can_promise_is_refused() -> None:
    program = capture(model(), (X,))
    with pytest.raises(RewriteError, match="a promise that a pass's formula decides"):
        rewrite.prove(program, program, contract=Contract(NEW, NEW))
    assert rewrite.prove(program, program, contract=Contract(SAME, NEW)).passed


def test_other_outputs_are_no_crash() -> None:
    wider = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    found = rewrite.prove(capture(model(), (X,)), capture(wider, (X,)))
    assert [check.name for check in found.failures] == ["outputs"]


@pytest.mark.parametrize(("promise", "code"), [("same", 1), ("close", 0), ("sane", 2)])
def test_the_command(tmp_path: Path, promise: str, code: int) -> None:
    for name, kind in (("a", "none"), ("b", "tanh")):
        rewrite.save(capture(model(kind), (X,)), tmp_path / f"{name}.pt2")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "a.pt2"), str(tmp_path / "b.pt2"), "--promise", promise])
    assert done.exit_code == code
