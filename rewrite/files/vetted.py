"""Every text in an exported graph, judged by the field it stands in. What is not known is not passed on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rewrite.errors import RewriteError
from rewrite.sources.installed import Installed

from . import checked
from .checked import Json, shown
from .expressions import check_expression
from .operators import serialized_target
from .specs import serialized_spec

_STACK = re.compile(r"[\w.,;@\[\]()' \-<>:]*")
_DEVICES = ("cpu", "cuda", "meta", "mps", "xpu")
_VERIFIERS = ("TRAINING", "ATEN", "EDGE", "")
_PARTS = 5_000_000


def vetted(document: Json, installed: Installed) -> Json:
    """The document of ``torch._export.serde.schema.ExportedProgram``, without the notes that torch would resolve.

    Raises RewriteError for a text that is no name, path, operator of the list, size expression or structure, where such
    a one belongs.
    """
    checked.table(document, "graph", "graph_module", "range_constraints", "schema_version")
    return _Vetter(installed).value("", document)


class _Vetter:
    def __init__(self, installed: Installed) -> None:
        self._left = _PARTS
        self._texts: Mapping[str, Callable[[Any], Any]] = {
            **dict.fromkeys(("name", "as_name"), _name_or_none),
            **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"), checked.path),
            **dict.fromkeys(("in_spec", "out_spec"), lambda value: serialized_spec(value, installed)),
            **dict.fromkeys(("target", "as_operator"), serialized_target),
            **dict.fromkeys(("torch_version", "as_string", "as_strings"), _plain),
            "fqn": _path_or_root,
            "forward_arg_names": checked.name,
            "field_names": checked.name,
            "expr_str": check_expression,
            "guards_code": _guard,
            "type": _device,
            "verifiers": _verifier,
            "real": _number,
            "imag": _number,
            "as_float": _number,
            "as_floats": _number,
            "as_float_lists": _number,
        }
        self._tables = {
            **dict.fromkeys(("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"), checked.name),
            "range_constraints": checked.symbol,
            "opset_version": checked.name,
            "as_string_to_argument": checked.name,
        }

    def value(self, key: str, value: Json) -> Json:
        """A value that stands under ``key``, with everything below it."""
        self._left -= 1
        if self._left < 0:
            raise RewriteError("its graph has more parts than any program")
        if key in ("as_custom_obj", "custom_obj", "custom_obj_values", "custom_obj_name") and value:
            raise RewriteError("its graph holds a custom object, which would be unpickled")
        if key == "metadata":
            return _metadata(value)
        if isinstance(value, str):
            return self._text(key, value)
        if isinstance(value, list):
            return [self.value(key, item) for item in value]
        if isinstance(value, dict):
            return self._table(key, value)
        return checked.whole(value, key) if type(value) is int else value

    def _table(self, key: str, value: dict[str, Json]) -> Json:
        if key == "treespec_namedtuple_fields":
            return {checked.path(k): self.value("", v) for k, v in value.items()}
        judge = self._tables.get(key)
        for name in value:
            if judge is not None:
                judge(name)
            elif not name.isidentifier():
                raise RewriteError(f"its graph has the field {shown(name)}")
        inner = "" if judge is not None else None
        return {name: self.value(name if inner is None else inner, item) for name, item in value.items()}

    def _text(self, key: str, value: str) -> str:
        if key not in self._texts:
            raise RewriteError(f"its graph has {shown(value)} as {key or 'a value'}, where no text belongs")
        self._texts[key](value)
        return value


def _metadata(value: Json) -> Json:
    """Of a node's notes the modules it stood in; torch would look up the others by name."""
    notes = checked.table(value, "metadata")
    stack = notes.get("nn_module_stack")
    if stack is None:
        return {}
    if not isinstance(stack, str) or len(stack) > 100_000 or not _STACK.fullmatch(stack):
        raise RewriteError(f"a node of its graph stands in the modules {shown(stack)}")
    return {"nn_module_stack": stack}


def _plain(value: str) -> None:
    if len(value) > 10_000 or not value.isprintable():
        raise RewriteError(f"its graph has the text {shown(value)}")


def _name_or_none(value: str) -> None:
    """Constants, and the calls that set a context, have empty names."""
    if value:
        checked.name(value)


def _path_or_root(value: str) -> None:
    if value:
        checked.path(value.split("@")[0], "module")


def _guard(value: str) -> None:
    """Conditions on sizes are read by a grammar of their own later, or left out."""
    if len(value) > 100_000:
        raise RewriteError("one of its conditions on sizes is too long")


def _device(value: str) -> None:
    if value not in _DEVICES:
        raise RewriteError(f"its graph names the device {shown(value)}")


def _verifier(value: str) -> None:
    if value not in _VERIFIERS:
        raise RewriteError(f"its graph names the dialect {shown(value)}")


def _number(value: str) -> None:
    if value not in ("Infinity", "-Infinity", "NaN"):
        raise RewriteError(f"its graph has {shown(value)} as a number")
