"""A disk without room: one line that names it, the old file as it was, nothing left beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# in a process of its own, since the limit on the size of a file cannot be raised again
SCRIPT = """
import resource, signal, sys
from rewrite.cli.commands import app
argv = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name in ("out.pt2", "out.pt", "out.safetensors", "out.onnx"):
    try:
        app(args=[*argv, "-o", name], prog_name="rewrite")
    except SystemExit as leaving:
        print(name, leaving.code, file=sys.stderr)
"""
OUT = ("out.pt2", "out.pt", "out.safetensors", "out.onnx")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("full")
    torch.save(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256)), folder / "m.pt")
    for name in OUT:
        (folder / name).write_bytes(b"before")
    argv = ["apply", "m.pt", "-p", "dyt", "--inputs", "2x64", "--no-verify"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *argv], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr.splitlines()


@pytest.mark.parametrize("name", OUT)
def test_one_line_names_the_disk(name: str, ran: tuple[Path, list[str]]) -> None:
    folder, lines = ran
    place = lines.index(f"{name} 2")
    assert lines[place - 1].startswith(f"error: cannot write {name}: the disk of {folder} has no room for it")
    assert len(lines) == 2 * len(OUT)


def test_the_old_files_are_there_and_nothing_else(ran: tuple[Path, list[str]]) -> None:
    folder, _ = ran
    assert {file.name for file in folder.iterdir()} == {"m.pt", *OUT}
    assert all((folder / name).read_bytes() == b"before" for name in OUT)
