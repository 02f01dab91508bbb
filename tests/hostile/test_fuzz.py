"""Whatever a file or a text holds, the command line ends with exit code 0 or 2 and one line, and has run nothing of it.

300 cases by default, always the same; `FUZZ_CASES=20000` (`make fuzz`) draws as many others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.hostile.archives import EXPORT, PROGRAM, Parts, make_parts, write_plain, write_signed
from tests.hostile.harness import Case, Oracle
from tests.hostile.mutations import (
    CODE,
    NAMES,
    Draw,
    as_text,
    entries_of,
    mutated_bytes,
    mutated_entries,
    mutated_json,
    mutated_safetensors,
    text_of,
    zipped,
)

CASES = int(os.environ.get("FUZZ_CASES", "300"))
INPUTS = ("--inputs", "2x4")
BAITS = ("antigravity", "this")

PIPELINES = (
    "dyt",
    "dyt{alpha=0.8}",
    "dyt{alpha=0.8 where=1},dyt",
    r"dyt{where='re:\d|x'}",
    "dyt{where='!1|type:LayerNorm'}",
)
PIECES = ("{", "}", ",", "=", "'", "''", " ", "\n", "dyt", "alpha", "where", "inf", "nan", "-", "1e999", "re:(", "re:(a+)+$")
PIECES += ("9" * 400, "none", "type:", "!", "|", *NAMES)
SPECS = ("2x4", "float32[2,4]", "float64[2,4]", "input=float32[2,4;-1..1]", "int64[2,4;0..100]", "bool[2,4]", "2x4 True")
SPEC_PIECES = ("x", "[", "]", ",", ";", "..", "=", " ", "0", "-1", "1e30", "inf", "9" * 30, "100000x", "float16", "None")
SPEC_PIECES += ("x1" * 200, "x.pt", "model.pt", *NAMES)


@dataclass(frozen=True)
class Seeds:
    """Good files of each kind, from which bad ones are made."""

    pickle: bytes
    weights: bytes
    parts: Parts
    config: Path


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as made:
        folder = Path(tempfile.mkdtemp())
        _save_config(folder)  # a first run of what imports, so that later ones show what a file does
        made.judge(Case(("show", "config"), folder, seconds=180))
        shutil.rmtree(folder)
        yield made


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    folder = tmp_path_factory.mktemp("seeds")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())
    torch.save(model, folder / "model.pt")
    safetensors.torch.save_file(model.state_dict(), folder / "w.safetensors")
    _save_config(folder)
    read = [(folder / name).read_bytes() for name in ("model.pt", "w.safetensors")]
    return Seeds(read[0], read[1], make_parts(folder), folder / "config")


def _save_config(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, max_position_embeddings=32)).save_pretrained(folder / "config")


def a_pickle(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    change = draw(st.sampled_from([0, 1, 1, 1]))
    data = zipped(mutated_entries(draw, entries_of(seeds.pickle))) if change else mutated_bytes(draw, seeds.pickle)
    (folder / "model.pt").write_bytes(data)
    return Case(("show", "model.pt", *INPUTS), folder)


def own_program(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    file, own = folder / "model.pt2", seeds.parts.own
    kind = draw(st.sampled_from(["program", "program", "entries", "bytes"]))
    if kind == "program":
        write_signed(file, {**own, PROGRAM: as_text(mutated_json(draw, json.loads(own[PROGRAM])))})
    elif kind == "entries":
        file.write_bytes(zipped(mutated_entries(draw, [(f"model/{name}", data) for name, data in own.items()])))
    else:
        file.write_bytes(mutated_bytes(draw, write_signed(file, own).read_bytes()))
    return _run_program(draw, folder)


def export(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    file, entries = folder / "model.pt2", seeds.parts.export
    kind = draw(st.sampled_from(["graph", "graph", "entries", "bytes"]))
    if kind == "graph":
        write_plain(file, {**entries, EXPORT: as_text(mutated_json(draw, json.loads(entries[EXPORT])))})
    elif kind == "entries":
        file.write_bytes(zipped(mutated_entries(draw, [(f"model/{name}", data) for name, data in entries.items()])))
    else:
        file.write_bytes(mutated_bytes(draw, write_plain(file, entries).read_bytes()))
    return _run_program(draw, folder)


def _run_program(draw: Draw, folder: Path) -> Case:
    command = draw(st.sampled_from([("show", "model.pt2"), ("apply", "model.pt2", "-p", "dyt", "--dry-run")]))
    return Case(command, folder)


def weights(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    (folder / "model.pt").write_bytes(seeds.pickle)
    change = draw(st.sampled_from([mutated_bytes, mutated_safetensors, mutated_safetensors]))
    (folder / "w.safetensors").write_bytes(change(draw, seeds.weights))
    return Case(("show", "model.pt", *INPUTS, "--weights", "w.safetensors"), folder)


def config(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    shutil.copytree(seeds.config, folder / "config")
    file = folder / "config" / "config.json"
    value = mutated_json(draw, json.loads(file.read_bytes()))
    file.write_bytes(draw(st.sampled_from([as_text(value), as_text(value), mutated_bytes(draw, file.read_bytes())])))
    return Case(("show", "config"), folder)


def pipeline(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    (folder / "model.pt").write_bytes(seeds.pickle)
    text = text_of(draw, PIPELINES, PIECES)
    return Case(("apply", "model.pt", f"--pipeline={text}", *INPUTS, "--dry-run"), folder, lines=3)


def inputs(draw: Draw, seeds: Seeds, folder: Path) -> Case:
    (folder / "model.pt").write_bytes(seeds.pickle)
    command = draw(st.sampled_from([("show", "model.pt"), ("apply", "model.pt", "-p", "dyt", "--dry-run")]))
    return Case((*command, f"--inputs={text_of(draw, SPECS, SPEC_PIECES)}"), folder)


KINDS: tuple[Callable[[Draw, Seeds, Path], Case], ...] = (a_pickle, own_program, export, weights, config, pipeline, inputs)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_whatever_it_holds(oracle: Oracle, seeds: Seeds, kind: Callable[[Draw, Seeds, Path], Case]) -> None:
    @settings(
        max_examples=CASES // len(KINDS) + 1,
        derandomize=CASES <= 300,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def cases(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as name:
            case = dataclasses.replace(kind(data.draw, seeds, Path(name)), baits=BAITS)
            verdict = oracle.judge(case)
            assert verdict.faults == (), (case.argv, verdict)

    cases()


def test_the_cases_are_hostile(oracle: Oracle, seeds: Seeds, tmp_path: Path) -> None:
    """What is unchanged is read, so that a refusal is one of the change."""
    (tmp_path / "model.pt").write_bytes(seeds.pickle)
    (tmp_path / "w.safetensors").write_bytes(seeds.weights)
    shutil.copytree(seeds.config, tmp_path / "config")
    write_signed(tmp_path / "own.pt2", seeds.parts.own)
    write_plain(tmp_path / "export.pt2", seeds.parts.export)
    good = [
        ("show", "model.pt", *INPUTS, "--weights", "w.safetensors"),
        ("show", "config"),
        ("show", "own.pt2"),
        ("apply", "export.pt2", "-p", "dyt", "--dry-run"),
    ]
    for argv in good:
        verdict = oracle.judge(Case(argv, tmp_path))
        assert (verdict.code, verdict.faults) == (0, ()), (argv, verdict)
    assert oracle.judge(Case(("show", "model.pt", "--inputs", CODE), tmp_path)).code == 2
