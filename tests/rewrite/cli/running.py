"""The command line in this process, and what it leaves in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from typer.testing import CliRunner, Result

from rewrite.cli.commands import app

ROOT = Path(__file__).parents[3]
MLP_INPUTS = ("--inputs", "2x8")
ESCAPE = "\x1b"


def run(*arguments: str | Path, code: int = 0) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def fails(*arguments: str | Path) -> str:
    """The error of a command that a user can mend: exit 2, nothing on stdout."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip("\n")


def fresh(code: str, folder: Path) -> str:
    """What a new process, which knows nothing of this one, prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4), nn.LayerNorm(4))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def changed_files(folder: Path, before: dict[str, bytes]) -> set[str]:
    after = contents(folder)
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
