"""The fingerprint of tensors: which writes it sees; and what a pass that writes by other means than torch may spoil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite import NEW, Contract, Pass, Program, RewriteError, apply
from rewrite.numerics.guard import fingerprint
from rewrite.pipeline.context import Context
from tests.captures import capture

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 33), (40, 40)])
def test_a_write_changes_it(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.zeros(shape, dtype=dtype)
    before = fingerprint([value])
    assert fingerprint([value.clone()]) == before
    value.reshape(-1)[-1] = 1
    assert fingerprint([value]) != before


def test_two_numbers_that_change_places_change_it() -> None:
    value = torch.arange(1000, dtype=torch.float32)
    before = fingerprint([value])
    for i, j in ((0, 1), (3, 700), (998, 999)):
        swapped = value.clone()
        swapped[[i, j]] = value[[j, i]]
        assert fingerprint([swapped]) != before


def test_views_of_any_offset_and_stride() -> None:
    base = torch.randn(9, 11)
    for view in (base.t(), base[1:], base[:, 1:], base.view(-1)[3:]):
        assert fingerprint([view]) == fingerprint([view.clone()])
    assert fingerprint([torch.empty(3, device="meta"), torch.empty(0)]) == fingerprint([torch.empty(0), torch.empty(0)])


@dataclass(frozen=True)
class ByNumpy(Pass):
    """Writes into a weight by NumPy, which no guard of torch's sees."""

    name = "by-numpy"

    def run(self, program: Program, context: Context) -> None:
        program.module.get_parameter("0.weight").detach().numpy()[:] = 2.0

    def contract(self) -> Contract:
        return Contract(NEW, NEW)


def test_a_pass_that_writes_by_numpy_spoils_nothing_of_the_callers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    program = capture(model, (torch.randn(2, 3),))
    before = fingerprint([*model.parameters(), *program.module.parameters()])
    with pytest.raises(RewriteError, match="broke its contract"):
        apply(program, ByNumpy(), crash_folder=tmp_path)
    assert fingerprint([*model.parameters(), *program.module.parameters()]) == before


def test_a_pass_that_reaches_past_its_program_is_stopped(tmp_path: Path) -> None:
    given = capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), (torch.randn(2, 3),))

    @dataclass(frozen=True)
    class Elsewhere(ByNumpy):
        name = "elsewhere"

        def run(self, program: Program, context: Context) -> None:
            super().run(given, context)

    with pytest.raises(RewriteError, match="wrote into a tensor of the program that it was given"):
        apply(given, Elsewhere(), crash_folder=tmp_path)
