"""The public names of the package: loaded lazily, and never hidden by a submodule of the same name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rewrite


def run(code: str, folder: Path | None = None) -> str:
    """What a fresh interpreter prints, started in this folder."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_imports_nothing_else() -> None:
    code = """
import rewrite, sys
heavy = {"torch", "typer", "rich", "numpy", "onnx"}
print(heavy & set(sys.modules), [name for name in sys.modules if name.startswith("rewrite.")])
"""
    assert run(code) == "set() []"


def test_every_public_name_is_there() -> None:
    assert sorted(rewrite._HOME) == sorted(rewrite.__all__)
    assert set(rewrite.__all__) <= set(dir(rewrite))
    for name in rewrite.__all__:
        value = getattr(rewrite, name)
        assert getattr(value, "__name__", getattr(value, "name", None)) == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rewrite' has no attribute 'nothing'"):
        rewrite.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_no_wing_bears_the_name_of_a_public_function() -> None:
    wings = {entry.stem for entry in Path(rewrite.__file__).parent.iterdir()}
    assert not wings & set(rewrite.__all__)


def test_importing_a_module_hides_no_public_name() -> None:
    code = "import rewrite.frontend.capture, rewrite.lowering.graft, rewrite; print(rewrite.capture, rewrite.graft)"
    assert re.fullmatch("<function capture at .*> <function graft at .*>", run(code))
