"""Containers of arguments and outputs as JSON and back: a structure holds plain containers and output classes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rewrite.errors import RewriteError
from rewrite.sources.compat import import_mended
from rewrite.sources.installed import Installed
from rewrite.torch_private import pytree

from .checked import Json, items, name, parsed, shown, table, text

_PLAIN = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_FIXED = ("builtins.tuple", "builtins.list")
_LEAVES = 100_000


class _AbsentError(RewriteError):
    """An output class whose library is not here."""


def encode_spec(spec: pytree.TreeSpec) -> str:
    """A structure as text; containers that a file does not name are plain ones in it."""
    return pytree.treespec_dumps(spec if all(_is_plain(node) for node in _nodes(spec)) else plain_spec(spec))


def encode_outputs(spec: pytree.TreeSpec) -> Json:
    """An output structure: in plain containers, and in its own classes where they can be named."""
    full: str | None = None
    if not any(node.type is not None and node.type.__module__ == "collections" for node in _nodes(spec)):
        with contextlib.suppress(Exception):  # a class registers how it is written, and may not have
            full = pytree.treespec_dumps(spec)
    return {"plain": pytree.treespec_dumps(plain_spec(spec)), "full": full}


def plain_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The same structure in dicts, lists and tuples alone, so that reading it needs no library."""
    return pytree.tree_structure(plain(pytree.tree_unflatten([0] * spec.num_leaves, spec)))


def plain(value: Any) -> Any:
    """A nest of containers with dicts, lists and tuples in place of any other class."""
    if pytree.tree_is_leaf(value):
        return value
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    children, _ = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    return [plain(v) for v in children] if isinstance(value, list) else tuple(plain(v) for v in children)


def decode_spec(value: Json) -> pytree.TreeSpec:
    """The structure that ``encode_spec`` wrote: leaves, tuples, lists and dicts."""
    schema = _schema(value)
    check_spec(schema, None)
    return pytree.treespec_loads(value)


def decode_outputs(value: Json, installed: Installed) -> pytree.TreeSpec:
    """An output structure in its own classes, if the library that defines them is installed; else in plain containers."""
    found = table(value, "output structure", "plain", "full")
    simple = decode_spec(found["plain"])
    if found["full"] is None:
        return simple
    schema = _schema(found["full"])
    try:
        check_spec(schema, installed)
        full = pytree.treespec_loads(found["full"])
        pytree.tree_unflatten([0] * full.num_leaves, full)
    except (_AbsentError, ImportError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError):
        return simple  # the library is not here, another version, or broken
    return full if full.num_leaves == simple.num_leaves else simple


def check_spec(schema: Any, installed: Installed | None, depth: int = 0) -> int:
    """The leaves of a structure, whose containers must be plain or, where ``installed`` is given, output classes.

    Such a class is named by its module, which must be installed and define it; it is imported. Raises RewriteError
    for any other container: some call whatever their context names.
    """
    entry = table(schema, "structure", "type", "context", "children_spec")
    children = items(entry["children_spec"], "structure", _LEAVES)
    if depth > 32:
        raise RewriteError("its structure is nested deeper than any program")
    if entry["type"] is None:
        if children:
            raise RewriteError("its structure has a leaf with children")
        return 1
    _check_container(text(entry["type"], "container"), entry["context"], len(children), installed)
    leaves = sum(check_spec(child, installed, depth + 1) for child in children)
    if leaves > _LEAVES:
        raise RewriteError("its structure has more leaves than any program")
    return leaves


def serialized_spec(value: Any, installed: Installed) -> None:
    """Refuse a structure as torch.export writes it, unless its containers are those that a file may name."""
    check_spec(_schema(value), installed)


def _schema(value: Any) -> Any:
    found = parsed(text(value, "structure").encode(), "structure")
    if not isinstance(found, list) or len(found) != 2 or found[0] != 1:
        raise RewriteError("its structure is written in another way than this torch's")
    return found[1]


def _check_container(kind: str, context: Any, children: int, installed: Installed | None) -> None:
    given = parsed(text(context, "context").encode(), "context")
    if kind in _FIXED:
        if given is not None:
            raise RewriteError(f"its structure has a {kind} with the context {shown(given)}")
        return
    keys = items(given, "context")
    if len(keys) != children or not all(isinstance(key, str | int) for key in keys) or len(set(keys)) != len(keys):
        raise RewriteError(f"its structure has a {kind} whose keys are {shown(given)}")
    if kind in _PLAIN:
        return
    if installed is None or kind.startswith("collections."):
        raise RewriteError(f"its structure has a {shown(kind)}, which is no container that a file may name")
    for key in keys:
        name(key, "field")
    _import_output(kind, installed)


def _import_output(kind: str, installed: Installed) -> None:
    """Import the home of an output class, unless that was done: then the class is registered by its name."""
    module, _, last = kind.rpartition(".")
    if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and installed.defines(module, last):
        import_mended(module)
    found = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(kind)
    if found is None or pytree.SUPPORTED_SERIALIZED_TYPES[found].from_dumpable_context is not None:
        raise _AbsentError(f"its structure has a {shown(kind)}, which is no container of an installed package")


def _is_plain(spec: pytree.TreeSpec) -> bool:
    return spec.type is None or f"{spec.type.__module__}.{spec.type.__qualname__}" in _PLAIN


def _nodes(spec: pytree.TreeSpec) -> Iterator[pytree.TreeSpec]:
    yield spec
    for child in spec.children():
        yield from _nodes(child)
