"""What is no file, and what asks for more than there is: pipes, devices, long names, configurations without measure."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from rewrite.sources.compat import import_mended
from tests.hostile.harness import Case, Oracle


def sock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 108 characters
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": sock,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("name", ["m.pt", "m.pt2", "m.bin"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_not_opened(kind: str, name: str, oracle: Oracle, tmp_path: Path) -> None:
    SPECIAL[kind](tmp_path / name)
    refused(oracle, tmp_path, "show", name, "--inputs", "2x2")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_weights_that_are_no_file_are_not_opened(kind: str, name: str, oracle: Oracle, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    SPECIAL[kind](tmp_path / name)
    refused(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2", "--weights", name)


@pytest.mark.parametrize("name", ["a" * 300 + ".pt", "a" * 300 + ".pt2", "a" * 300, "b/" * 3000 + "m.pt"])
def test_names_without_end(name: str, oracle: Oracle, tmp_path: Path) -> None:
    refused(oracle, tmp_path, "show", name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = import_mended("transformers")
    made: Path = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(made)
    return made


CONFIGS = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a number of layers without end": {"num_hidden_layers": 10**400},
    "more layers than weights": {"num_hidden_layers": 1400},
    "a wide layer": {"hidden_size": 4 * 10**8},
    "a large vocabulary": {"vocab_size": 10**12},
    "layers as a text": {"num_hidden_layers": "9" * 1000},
    "no layers": {"num_hidden_layers": -1},
    "no heads": {"num_attention_heads": 0},
    "another model": {"model_type": "../../x", "architectures": ["os.system"]},
    "no architecture": {"architectures": 5},
    "code of its own": {"auto_map": {"AutoModel": "evil.Model"}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_bound_by_its_weights(name: str, oracle: Oracle, folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path / "m", CONFIGS[name])
    verdict = oracle.judge(Case(("show", "m"), tmp_path, baits=("evil",)))
    assert verdict.faults == ()
    assert verdict.code == (0 if name in ("code of its own", "no layers") else 2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pipe_in_a_folder_is_not_opened(name: str, oracle: Oracle, folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path / "m", {})
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    refused(oracle, tmp_path, "show", "m")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null", '{"a":' * 9999])
def test_a_configuration_that_is_none(text: str, oracle: Oracle, folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path / "m", {})
    (tmp_path / "m/config.json").write_text(text)
    refused(oracle, tmp_path, "show", "m")


def copied(folder: Path, to: Path, change: dict[str, object]) -> None:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **change}))


def refused(oracle: Oracle, folder: Path, *argv: str) -> None:
    verdict = oracle.judge(Case(argv, folder))
    assert (verdict.code, verdict.faults) == (2, ())
