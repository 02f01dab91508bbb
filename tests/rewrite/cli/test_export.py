"""`rewrite export`."""

from __future__ import annotations

from pathlib import Path

import rewrite
from tests.rewrite.cli.running import MLP_INPUTS, fails, run


def test_export_writes_no_modules(model: Path) -> None:
    assert "give an .onnx or .pt2 file" in fails("export", model, "-o", "x.pt")
    run("export", model, *MLP_INPUTS, "-o", "x.pt2", "-p", "dyt")
    assert [record.name for record in rewrite.load("x.pt2").history] == ["dyt"]
