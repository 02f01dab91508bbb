"""`rewrite show`."""

from __future__ import annotations

from pathlib import Path

from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, run


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
