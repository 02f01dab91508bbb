"""What a pass declares, read from its source: its class without ``run``, made without importing what the pass needs.

A list of passes, the help of one and tab completion want names, options and promises, and no torch. So the statements of
the module that say those are executed alone: the class with its fields and its contract, and what these refer to, as long
as that is plain (a value, an enum) or comes from a module that costs nothing to import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .pass_ import Pass

_CHEAP = (
    "dataclasses",
    "enum",
    "math",
    "typing",
    "rewrite.errors",
    "rewrite.pipeline.pass_",
    "rewrite.pipeline.select",
    "rewrite.proof.contract",
)
_KEPT = ("contract", "__post_init__")


def declared(entry_point: EntryPoint) -> type[Pass] | None:
    """The pass of an entry point as far as it can be described; None where only an import can tell.

    The class says its name, documentation, options and contract; it does not run.
    """
    try:
        return _made(entry_point)
    except Exception:  # whatever the matter is, the import will tell
        return None


def _made(entry_point: EntryPoint) -> type[Pass] | None:
    spec = find_spec(entry_point.module)
    if spec is None or spec.origin is None:
        return None
    tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    defined = {name: statement for statement in tree.body for name in _names(statement)}
    target = defined.get(entry_point.attr)
    if not isinstance(target, ast.ClassDef):
        return None
    bare = _bare(target)
    needed = _needed(bare, defined)
    if needed is None:
        return None
    kept = [bare if each is target else each for each in tree.body if each is target or each in needed]
    # annotations are evaluated at once: afterwards nobody would know where their names are from
    module = ast.fix_missing_locations(ast.Module(kept, []))
    space: dict[str, Any] = {"__name__": entry_point.module}
    exec(compile(module, spec.origin, "exec", dont_inherit=True), space)
    found = space[entry_point.attr]
    return found if isinstance(found, type) and issubclass(found, Pass) else None


def _names(statement: ast.stmt) -> Iterator[str]:
    """What a statement of a module defines, where it is of a kind that can be taken alone."""
    if isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _bare(target: ast.ClassDef) -> ast.ClassDef:
    """The class with its fields and its contract, and a ``run`` that is never called."""
    kept = [s for s in target.body if "inserts" not in _names(s) and (not isinstance(s, ast.FunctionDef) or s.name in _KEPT)]
    run = ast.parse("def run(self, program, context): raise NotImplementedError").body
    return ast.ClassDef(target.name, target.bases, target.keywords, [*kept, *run], target.decorator_list)


def _needed(bare: ast.ClassDef, defined: dict[str, ast.stmt]) -> list[ast.stmt] | None:
    """The statements that the class refers to, directly or by each other; None where one is not cheap."""
    found: list[ast.stmt] = []
    waiting: list[ast.stmt] = [bare]
    while waiting:
        for node in ast.walk(waiting.pop()):
            statement = defined.get(node.id) if isinstance(node, ast.Name) else None
            if statement is None or statement in found or getattr(statement, "name", "") == bare.name:
                continue
            if not _is_cheap(statement):
                return None
            found.append(statement)
            waiting.append(statement)
    return found


def _is_cheap(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.ImportFrom):
        return not statement.level and statement.module in _CHEAP
    if isinstance(statement, ast.Import):
        return all(alias.name in _CHEAP for alias in statement.names)
    return True
