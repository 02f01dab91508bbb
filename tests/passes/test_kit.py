"""Every pass against every check of the kit, on every model that its rows name."""

from __future__ import annotations

from collections import Counter

import pytest

from rewrite.testing import FreshProcess, check_pass

from .table import Row, passes, rows, subject

ROWS = rows()


def row_param(family: str, row: Row) -> object:
    return pytest.param(row, marks=pytest.mark.xdist_group(f"{family} {row.model}"), id=f"{row.step}-{row.model}")


@pytest.mark.parametrize("row", [row_param(family, row) for family, row in ROWS])
def test_pass(row: Row, fresh_process: FreshProcess, request: pytest.FixtureRequest) -> None:
    compiled = row.compiled and not request.config.getoption("--fast")
    check_pass(
        row.step,
        subject(row.model, row.after),
        changes=row.changes,
        near_miss=row.near_miss,
        again=row.again,
        data=row.data(),
        lowerings=("eager", "onnxruntime", "inductor") if compiled else ("eager", "onnxruntime"),
        process=fresh_process,
    )


@pytest.mark.parametrize("name", passes())
def test_every_pass_is_tried_on_models_with_and_without_a_place_for_it(name: str) -> None:
    counts = [row.changes for _, row in ROWS if row.name == name]
    assert any(counts), f"no row of {name} changes anything"
    assert not all(counts), f"no row of {name} is a model that it leaves as it is"


def test_one_model_of_each_family_is_compiled() -> None:
    compiled = Counter(family for family, row in ROWS if row.compiled)
    assert dict(compiled) == dict.fromkeys({family for family, _ in ROWS}, 1)
