"""`rewrite depth`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from tests.rewrite.cli.running import run


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def saved(folder: Path) -> tuple[Path, Path]:
    model, data = folder / "model.pt", folder / "data.pt"
    torch.save(nn.Sequential(Residual(), Residual(), Residual()), model)
    torch.save([torch.randn(2, 8), torch.randn(2, 8)], data)
    return model, data


def test_depth_as_a_table_and_as_json(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    arguments = ("depth", model, "--inputs", "2x8", "--data", data, "--trust-pickle")
    text = run(*arguments).stdout
    for expected in ("influence", "|F| / |x|", "dependency M[i, j]", "longest chain: 6 products"):
        assert expected in text
    found = json.loads(run(*arguments, "--json", "-p", "drop-ffn{layers=1}").stdout)
    assert [len(found[name]["blocks"]) for name in ("before", "after")] == [3, 2]
    assert [found[name]["chain"]["steps"] for name in ("before", "after")] == [6, 4]


def test_depth_as_a_picture_with_the_critical_path_before_and_after(tmp_path: Path) -> None:
    model, data = saved(tmp_path)
    picture = tmp_path / "depth.svg"
    common = ("depth", model, "--inputs", "2x8", "--data", data, "--trust-pickle", "-p", "drop-ffn{layers=1}")
    assert "critical path: 6 products before, 4 after, 67% of the FLOPs" in run(*common, "--picture", picture).stdout
    drawn = picture.read_text()
    assert drawn.count("<image") >= 2  # a heat map before, one after
    assert "a picture is written as .png, .svg, .pdf" in run(*common, "--picture", tmp_path / "x.txt", code=2).stderr


def test_depth_needs_data(tmp_path: Path) -> None:
    model, _ = saved(tmp_path)
    result = run("depth", model, "--inputs", "2x8", "--trust-pickle", code=2)
    assert "depth is told by data: give some with --data FILE" in result.stderr
