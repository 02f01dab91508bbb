"""`rewrite show`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, fails, run


def test_show(model: Path) -> None:
    text = run("show", model, *MLP_INPUTS).stdout
    assert ESCAPE not in text
    for expected in (
        "torch.nn.modules.container.Sequential",
        "252 float32",
        "float32 [2 dynamic, 8]",
        "2 Linear, 2 LayerNorm, 1 GELU",
        "LayerNorm [16] eps 1e-05",
        "nothing: passes see every part",
    ):
        assert expected in text


@pytest.mark.parametrize("dtype", ["int64", "float16", "float64", "bool"])
def test_inputs_of_another_dtype_are_named(model: Path, dtype: str) -> None:
    """A capture alone lets them pass: it computes nothing."""
    message = fails("show", model, "--inputs", f"{dtype}[2,8]")
    assert "the model does not run on its example inputs" in message or "cannot be captured" in message
    assert f"its parameters are float32, and the inputs hold {dtype}" in message
