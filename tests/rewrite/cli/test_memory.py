"""`rewrite memory`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from rewrite.cli.render import measured_table
from rewrite.graph.history import Measured
from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, fails, run


def test_memory_before_and_after_a_pass(model: Path) -> None:
    text = run("memory", model, *MLP_INPUTS, "--pass", "few-bit", "--no-baselines").stdout
    assert ESCAPE not in text
    for expected in ("before, KiB", "after, KiB", "GELU", "FewBit", "LayerNorm", "times less"):
        assert expected in text


def test_memory_as_json(model: Path) -> None:
    found: Any = json.loads(run("memory", model, *MLP_INPUTS, "--json", "--no-baselines").stdout)
    assert list(found) == ["before"]
    assert found["before"]["bytes"] == sum(each["bytes"] for each in found["before"]["kept"]) > 0


def test_other_ways_stand_beside_it_and_a_picture_is_drawn(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    found: Any = json.loads(run("memory", model, *MLP_INPUTS, "--pass", "few-bit", "--picture", picture, "--json").stdout)
    assert "frontier" not in found
    assert [way["name"] for way in found["ways"]] == [
        "eager",
        "checkpoint per block",
        "torch.compile",
        "torch.compile, budget 0.5",
        "passes",
        "passes, torch.compile",
        "passes, torch.compile, budget 0.5",
    ]
    assert not any(way["problem"] for way in found["ways"])
    assert found["ways"][0]["bytes"] == found["before"]["bytes"]
    assert found["ways"][4]["bytes"] == found["after"]["bytes"]
    assert all(way["peak"] >= way["bytes"] > 0 and way["seconds"] > 0 for way in found["ways"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_one_row_where_only_numbers_in_names_differ() -> None:
    rows = [Measured(f"h.{i}.norm", {"bytes": 8192, "choice": "recompute"}) for i in range(3)]
    rows += [
        Measured("h.3.norm", {"bytes": 8192, "choice": "8 bits"}),
        Measured("h.4.norm", {"bytes": 8192, "choice": "4 bits"}),
    ]
    rows += [Measured("frontier", {"noise": 0.25})]
    console = Console(width=60)
    with console.capture() as capture:
        console.print(measured_table(rows))
    assert [line.split() for line in capture.get().splitlines()] == [
        ["place", "bytes", "choice"],
        ["3", "of", "h.*.norm", "8,192", "recompute"],
        ["h.3.norm", "8,192", "8", "bits"],
        ["h.4.norm", "8,192", "4", "bits"],
        ["place", "noise"],
        ["frontier", "0.25"],
    ]


def test_a_frontier_is_drawn(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "frontier.svg"
    text = ["--pass", "fit-memory{budget=0.9 min_size=1}", "--no-baselines", "--picture", picture]
    found: Any = json.loads(run("memory", model, *MLP_INPUTS, *text, "--json").stdout)
    assert found["frontier"][0]["kept"] <= 0.75
    assert "the best plan of each size" in picture.read_text()


def test_a_picture_of_another_kind_is_refused(model: Path) -> None:
    assert fails("memory", model, *MLP_INPUTS, "--no-baselines", "--picture", "memory.txt") == (
        "a picture is written as .png, .svg, .pdf, not as memory.txt"
    )


def test_an_unknown_backend_is_refused(model: Path) -> None:
    assert fails("memory", model, *MLP_INPUTS, "--backend", "other") == (
        "memory is measured for eager or inductor, not 'other'"
    )
