"""What a pass declares, read from its source: its class without ``run``, made without importing what the pass needs.

A list of passes, the help of one and tab completion want names, options and promises, and no torch. So the statements of
the module that say those are executed alone: the class with its fields and its contract, and what these refer to, as long
as that is plain (a value, an enum, a base class of the same kind), here or in another module, or comes from a module that
costs nothing to import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .pass_ import Pass

_CHEAP = (
    "collections.abc",
    "dataclasses",
    "enum",
    "math",
    "re",
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
    found = _value(entry_point.module, entry_point.attr, bare=True)
    return found if isinstance(found, type) and issubclass(found, Pass) else None


def _value(module: str, name: str, *, bare: bool = False) -> Any:
    """What a module calls ``name``, by as few of its statements as say so; of a class the ``bare`` one.

    Raises whatever goes wrong where only an import of the module can tell.
    """
    if module in _CHEAP:
        return getattr(import_module(module), name)
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    defined = {known: statement for statement in tree.body for known in _names(statement)}
    target = defined[name]
    if isinstance(target, ast.ImportFrom):
        return _value(_home(module, target), _original(target, name), bare=bare)
    stripped = _bare(target) if bare and isinstance(target, ast.ClassDef) else target
    bases = (
        {base.id for base in stripped.bases if isinstance(base, ast.Name)} if isinstance(stripped, ast.ClassDef) else set()
    )
    space: dict[str, Any] = {"__name__": module}
    needed: list[ast.stmt] = []
    for known, statement in _needed(stripped, defined):
        if isinstance(statement, ast.ImportFrom):
            space[known] = _value(_home(module, statement), _original(statement, known), bare=known in bases)
        elif statement not in needed:
            needed.append(statement)
    kept = [stripped if each is target else each for each in tree.body if each is target or each in needed]
    # annotations are evaluated at once: afterwards nobody would know where their names are from
    code = ast.fix_missing_locations(ast.Module(kept, []))
    exec(compile(code, spec.origin, "exec", dont_inherit=True), space)
    return space[name]


def _home(module: str, statement: ast.ImportFrom) -> str:
    """The module that a statement in ``module`` imports from."""
    if not statement.level:
        return statement.module or ""
    return ".".join([*module.split(".")[: -statement.level], *([statement.module] if statement.module else [])])


def _original(statement: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)


def _names(statement: ast.stmt) -> Iterator[str]:
    """What a statement of a module defines, where it is of a kind that can be taken alone."""
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
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


def _needed(target: ast.stmt, defined: dict[str, ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a statement refers to, directly or by each other, with the statements that say them; of imported
    ones no more. Raises ImportError for an import of a whole module that is not cheap.
    """
    found: set[str] = {getattr(target, "name", "")}
    waiting: list[ast.stmt] = [target]
    while waiting:
        for node in ast.walk(waiting.pop()):
            statement = defined.get(node.id) if isinstance(node, ast.Name) and node.id not in found else None
            if statement is None or not isinstance(node, ast.Name):
                continue
            found.add(node.id)
            if isinstance(statement, ast.Import) and not all(alias.name in _CHEAP for alias in statement.names):
                raise ImportError(node.id)
            yield node.id, statement
            if not isinstance(statement, ast.ImportFrom):
                waiting.append(statement)
