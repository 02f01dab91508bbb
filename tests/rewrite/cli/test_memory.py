"""`rewrite memory`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, fails, run


def test_memory_before_and_after_a_pass(model: Path) -> None:
    text = run("memory", model, *MLP_INPUTS, "--pass", "few-bit").stdout
    assert ESCAPE not in text
    for expected in ("before, KiB", "after, KiB", "GELU", "FewBit", "LayerNorm", "times less"):
        assert expected in text


def test_memory_as_json(model: Path) -> None:
    found: Any = json.loads(run("memory", model, *MLP_INPUTS, "--json").stdout)
    assert list(found) == ["before"]
    assert found["before"]["bytes"] == sum(each["bytes"] for each in found["before"]["kept"]) > 0


def test_an_unknown_backend_is_refused(model: Path) -> None:
    assert fails("memory", model, *MLP_INPUTS, "--backend", "other") == (
        "memory is measured for eager or inductor, not 'other'"
    )
