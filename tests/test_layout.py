"""The wings: imports run one way, every pass file has its entry point, no wing has more than it says."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewrite.torch_private import ATTRIBUTES, NAMES

ROOT = Path(__file__).parents[1]
#: What each wing may import of the others, `wing` or `wing.module`; errors and torch's private names are for all.
WINGS = {
    "graph": ("plugins",),
    "sources": (),
    "numerics": ("graph",),
    "frontend": ("graph", "numerics", "plugins"),
    "analysis": ("graph", "numerics", "sources.data"),
    "axes": ("graph", "analysis"),
    "training": ("graph", "numerics", "frontend.capture"),
    "healing": ("graph", "numerics", "analysis", "frontend.capture", "sources.data", "files.staging"),
    "proof": ("graph", "numerics", "analysis.writes"),
    "lowering": ("graph", "numerics", "plugins"),
    "pipeline": ("graph", "numerics", "analysis", "axes", "proof", "frontend.capture", "plugins", "sources.data"),
    "rebuild": ("graph", "numerics", "lowering", "sources", "axes"),
    "files": ("graph", "sources", "frontend", "lowering", "rebuild"),
}
PASSES = ("pipeline", "analysis", "axes", "training", "graph", "proof.contract", "proof.part")
BACKENDS = ("lowering", "graph", "numerics", "files.staging")


def imports(file: Path) -> Iterator[str]:
    """The modules below `rewrite` that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module == "rewrite":
                yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
            elif node.module.startswith("rewrite."):
                yield node.module.removeprefix("rewrite.")


def strays(folder: Path, wing: str, allowed: tuple[str, ...]) -> list[str]:
    """The imports that a folder must not have."""
    legal = ("errors", "torch_private", wing, *allowed)
    return [
        f"{file.relative_to(ROOT)} imports rewrite.{name}"
        for file in sorted(folder.rglob("*.py"))
        for name in imports(file)
        if not any(name == each or name.startswith(f"{each}.") for each in legal)
    ]


@pytest.mark.parametrize("wing", WINGS)
def test_imports_run_one_way(wing: str) -> None:
    assert strays(ROOT / "rewrite" / wing, wing, WINGS[wing]) == []


@pytest.mark.parametrize("top", ["cli", "testing"])
def test_nothing_imports_the_command_line_or_the_kit(top: str) -> None:
    files = [f for f in (ROOT / "rewrite").rglob("*.py") if f.parent.name != top and f.name != "__main__.py"]
    assert [f for f in files for name in imports(f) if name.split(".")[0] == top] == []


def test_every_wing_has_its_rule() -> None:
    wings = {p.parent.name for p in (ROOT / "rewrite").glob("*/__init__.py")}
    assert wings == {*WINGS, "cli", "testing"}


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in (ROOT / "passes").glob("*/__init__.py")))
def test_a_family_of_passes_knows_the_engine_and_no_other_family(folder: str) -> None:
    assert strays(ROOT / "passes" / folder, f"passes.{folder}", PASSES) == []


def test_backends_know_what_lowering_needs() -> None:
    assert strays(ROOT / "backends", "backends", BACKENDS) == []


def test_every_pass_file_has_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {value.partition(":")[0] for value in project["project"]["entry-points"]["rewrite.passes"].values()}
    files = [f.relative_to(ROOT) for f in (ROOT / "passes").rglob("*.py") if f.name != "__init__.py"]
    assert {f"rewrite.{'.'.join(file.with_suffix('').parts)}" for file in files} == named


def test_every_folder_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    inits = [
        f.parent.relative_to(ROOT) for top in ("rewrite", "passes", "backends") for f in (ROOT / top).rglob("__init__.py")
    ]
    names = {".".join(("rewrite", *parts.parts) if parts.parts[0] != "rewrite" else parts.parts) for parts in inits}
    assert names == set(project["tool"]["setuptools"]["packages"])


def test_no_file_imports_upwards_by_dots() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for top in ("rewrite", "passes", "backends")
        for file in (ROOT / top).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 1
    ]
    assert found == []


def test_private_names_of_torch_stand_in_one_file() -> None:
    files = [f for top in ("rewrite", "passes", "backends") for f in sorted((ROOT / top).rglob("*.py"))]
    trees = {f.relative_to(ROOT): ast.parse(f.read_text()) for f in files if f.name != "torch_private.py"}
    listed = {*ATTRIBUTES, *(name.rpartition(".")[2] for name in NAMES), *NOT_TORCH}
    known = {name for tree in trees.values() for name in own_names(tree)} | listed
    assert [f"{file}: {name}" for file, tree in trees.items() for name in foreign_names(tree) if name not in known] == []


#: Private names of the standard library, and of an operator.
NOT_TORCH = ("_getframe", "_ParameterKind", "_to_copy", "_exit")


def own_names(tree: ast.Module) -> Iterator[str]:
    """The names that a file defines as methods and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node.attr


def foreign_names(tree: ast.Module) -> Iterator[str]:
    """What a file imports from inside torch, and the private attributes that it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if re.search(r"\._|experimental", name))
        elif isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
            yield node.attr
