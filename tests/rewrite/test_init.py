"""The public names of the package: loaded lazily, and never hidden by a submodule of the same name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rewrite

CLASHES = sorted(name for name, home in rewrite._HOME.items() if name == home)


def run(code: str, folder: Path | None = None) -> str:
    """What a fresh interpreter prints, started in this folder."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def hollow(tmp_path: Path) -> Path:
    """A folder whose `rewrite` is the real package over empty modules, quick to import."""
    package = tmp_path / "rewrite"
    package.mkdir()
    (package / "__init__.py").write_text(Path(rewrite.__file__).read_text())
    for name, home in rewrite._HOME.items():
        with (package / f"{home}.py").open("a") as module:
            module.write(f"def {name}(): ...\nother = 1\n")
    return tmp_path


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
        assert getattr(rewrite, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rewrite' has no attribute 'nothing'"):
        rewrite.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", CLASHES)
@pytest.mark.parametrize(
    "order",
    [
        "import rewrite.{0}",
        "from rewrite.{0} import other",
        "from rewrite.{0} import {0} as again; assert again is rewrite.{0}",
        "rewrite.{0}; import rewrite.{0}",
        "import rewrite.{0}; importlib.reload(sys.modules['rewrite.{0}'])",
        "from rewrite import {0}; from rewrite.{0} import other",
        "from rewrite import *; import rewrite.{0}; assert rewrite.{0} is {0}",
        "importlib.import_module('rewrite.{0}').other",
        "import rewrite.{0}; importlib.reload(rewrite); import rewrite.{0}",
    ],
)
def test_a_function_is_not_hidden_by_its_module(hollow: Path, name: str, order: str) -> None:
    code = f"import importlib, sys, rewrite; {order.format(name)}; print(rewrite.{name})"
    assert run(code, hollow).startswith(f"<function {name} at ")


def test_submodules_without_a_function_of_their_name_are_attributes_as_usual() -> None:
    assert run("import rewrite.text; print(rewrite.text.parse.__name__)") == "parse"
