"""The first wall before a pickled module: names are judged before anything is imported or any object made.

What passes: module classes and data classes of installed packages, rebuilt without calling their constructor;
enums; and as values the functions of `torch.nn.functional`, torch's functions on tensors and the layer classes
of `torch.nn`. A class's own `__setstate__` does run: it is code that was installed, as the model's forward is.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import re
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.torch_private import torch_c

from .compat import import_mended, why_import_fails
from .installed import Installed
from .pickle_scan import Global, Node, Scan

REBUILD = {
    f"torch._utils._rebuild_{name}"
    for name in (
        "tensor",
        "tensor_v2",
        "parameter",
        "parameter_with_state",
        "sparse_tensor",
        "qtensor",
        "meta_tensor_no_storage",
    )
}
TYPED = "torch._tensor._rebuild_from_type_v2"
_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter"}
# `torch.tanh` is pickled as the attribute of a class that is not public.
_GETATTR, _OWNER = "builtins.getattr", Global("torch._C", "_VariableFunctionsClass")
_TORCH_FUNCTIONS: Any = vars(torch_c)[_OWNER.name]
_DATA = {"builtins.set", "builtins.frozenset", "builtins.bytearray", "builtins.complex", "builtins.slice"}
_DATA |= {"torch.Size", "torch.device", "torch.serialization._get_layout", "collections.OrderedDict"}
_CALLED = REBUILD | _DATA | {TYPED, _GETATTR, "functools.partial", "_codecs.encode"}
_FUNCTIONS = {"torch.nn.functional", "torch._C._nn", "torch._C._special"}
#: The hooks by which a grafted model runs under the properties of its program: each applies what an installed package
#: announces under a name, with a value that it checks, and nothing else.
_OURS = {"rewrite.graph.hooks.Enter", "rewrite.graph.hooks.Leave"}
_HOOKS = re.compile(r"_.*_hooks(_with_kwargs|_always_called)?|_compiled_call_impl")
Allowed = tuple[Callable[..., Any], str]
# Beside `__del__` and unpickling methods: what turns a stored value into a call.
_ACTIVE = {"__new__", "__call__", "__del__", "__getattr__", "__setstate__", "__reduce__", "__reduce_ex__"}


class RefusedError(RewriteError):
    """The pickle asks for more than a saved module does; the text is what it does."""


def vet(found: Scan, unsafe: set[str]) -> list[Allowed]:
    """Judge a pickle; the result is what `torch.serialization.safe_globals` is to allow for it.

    Args:
        found: the pickle.
        unsafe: the names in it that torch does not vouch for (`get_unsafe_globals_in_checkpoint`).

    Raises:
        RefusedError: it names, calls, rebuilds or stores what a saved module does not.
    """
    installed = Installed.here()
    for name in found.names:
        _check_name(name, unsafe, installed)
    for node in found.nodes:
        _check_shape(node)
    allowed = _resolve(found, unsafe, installed)
    for node in found.nodes:
        _check_states(node, allowed)
    return [(value, name) for name, value in allowed.items()]


# ---- by name ---------------------------------------------------------------------------------------------


def _check_name(found: Global, unsafe: set[str], installed: Installed) -> None:
    """Refuse what no role allows."""
    parts = found.module.split(".")
    if not (found.name.isidentifier() and all(part.isidentifier() for part in parts)) or "__main__" in parts:
        raise RefusedError(f"names {found.path!r}, which is no plain name")
    known = found.path not in unsafe or found.path in _CALLED | {_OWNER.path}
    if known or found.module in _FUNCTIONS:
        return
    if parts[0] == "torch" and not found.module.startswith("torch.nn."):
        raise RefusedError(f"names {found.path}, which belongs to torch's own workings")
    if not installed.defines(found.module, found.name):
        raise RefusedError(f"names {found.path}, which is no class of an installed package")


def _check_shape(node: Node) -> None:
    """What is called or rebuilt is given by name, and no argument is a callable that is then run."""
    if node.kind not in ("call", "new"):
        return
    if not node.callee:
        raise RefusedError("calls something that it computed")
    if node.kind == "new" and node.items:
        raise RefusedError(f"gives arguments to {node.callee}")
    if node.kind == "call" and not _has_usual_arguments(node):
        raise RefusedError(f"calls {node.callee} with arguments that no saved module has")
    if node.kind == "call" and node.states and node.callee != "functools.partial":
        raise RefusedError(f"changes what {node.callee} made")


def _has_usual_arguments(node: Node) -> bool:
    items = node.items
    if node.callee in REBUILD:
        if node.callee.endswith("_with_state"):
            return _without_hooks(items[:3]) and _adds_attributes(items[3:])
        return _without_hooks(items)
    if node.callee == TYPED:
        names = [item.path for item in items[:2] if isinstance(item, Global)]
        inner = items[2].items if len(items) == 4 and isinstance(items[2], Node) else None
        usual = len(names) == 2 and names[0] in REBUILD and names[1] in _TENSORS
        return usual and inner is not None and _without_hooks(inner) and _adds_attributes(items[3:])
    if node.callee == _GETATTR:
        if len(items) != 2 or items[0] != _OWNER:
            raise RefusedError(f"looks up the attribute {items[-1]!r} of an object" if items else "calls getattr")
        return type(items[1]) is str and _is_on_tensors(items[1])
    if node.callee == "_codecs.encode":
        return len(items) == 2 and items[1] == "latin1"
    if node.callee == "collections.OrderedDict":
        return not items
    return node.callee in _CALLED or len(items) == 1  # an enum is called with its value


def _without_hooks(items: tuple[Any, ...]) -> bool:
    """A tensor's gradient hooks are the only callables among its arguments."""
    return not any(isinstance(item, Node) and (item.entries or item.kind == "new") for item in items)


def _adds_attributes(states: tuple[Any, ...]) -> bool:
    """Whether a tensor's state has only attributes that tensors lack: others change what the tensor is."""
    if len(states) != 1 or not isinstance(states[0], Node) or states[0].kind != "dict":
        return False
    return all(type(key) is str and not hasattr(torch.Tensor, key) for key in states[0].entries[::2])


# ---- by what the names stand for -------------------------------------------------------------------------


def _resolve(found: Scan, unsafe: set[str], installed: Installed) -> dict[str, Any]:
    """Import what is rebuilt, called or stored, check that it is fit for that, and return it by name."""
    called = {node.callee: node.of for node in found.nodes if node.kind == "call"}
    rebuilt = {node.callee: node.of for node in found.nodes if node.kind == "new"}
    objects = {path: _import(name, installed) for path, name in rebuilt.items()}
    packages = {_package(path) for path, value in objects.items() if _is_module_class(value)} - {"torch"}
    for path, value in objects.items():
        if not (_is_module_class(value) or path in _OURS or (_is_data_class(value) and _package(path) in packages)):
            raise RefusedError(f"rebuilds a {path}, which is neither a module nor plain data")
    for path in called.keys() - _CALLED:
        objects[path] = _import(called[path], installed)
        if not (isinstance(objects[path], type) and issubclass(objects[path], enum.Enum)):
            raise RefusedError(f"calls {path}")
    objects |= {path: stand_in for path, stand_in in _STAND_INS.items() if path in called}
    if _GETATTR in called:
        objects[_OWNER.path] = _TORCH_FUNCTIONS
    active = [name for name in _stored(found) if not _is_inert(name, unsafe)]
    return objects | {name.path: _value(name, installed) for name in active}


def _package(path: str) -> str:
    return path.partition(".")[0]


def _stored(found: Scan) -> list[Global]:
    """The names that are values: all that a node holds, but for the two calls whose arguments were checked."""
    held = [found.root]
    checked = {id(node.items) for node in found.nodes if node.callee in (TYPED, _GETATTR)}
    for node in found.nodes:
        own = node.items if node.kind in ("tuple", "storage") and id(node.items) not in checked else ()
        held += [*own, *node.entries, *node.states]
    return list(dict.fromkeys(item for item in held if isinstance(item, Global)))


def _is_inert(name: Global, unsafe: set[str]) -> bool:
    """A dtype, a storage or tensor class: torch vouches for it, and nothing is made by calling it later."""
    return name.path not in unsafe and name.path not in _CALLED - {"torch.Size", "torch.device"}


def _is_module_class(value: object) -> bool:
    if not isinstance(value, type) or not issubclass(value, nn.Module):
        return False
    made_from_code = issubclass(value, (torch.jit.ScriptModule, torch.fx.GraphModule))
    return "__new__" not in _own_names(value) and not made_from_code


def _is_data_class(value: object) -> bool:
    """Whether instances only hold attributes."""
    if not isinstance(value, type) or issubclass(value, (nn.Module, type, BaseException)):
        return False
    return not _ACTIVE & _own_names(value)


def _own_names(cls: type) -> set[str]:
    return {name for base in cls.__mro__ if base is not object for name in vars(base)}


def _value(name: Global, installed: Installed) -> Any:
    if name.module in _FUNCTIONS:
        value = getattr(importlib.import_module(name.module), name.name, None)
        is_function = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
        if is_function and value.__module__ in (name.module, None) and not name.name.startswith("_"):
            return value
    elif name.module.startswith("torch.nn.modules.") and _is_module_class(value := _import(name, installed)):
        return value
    raise RefusedError(f"stores {name.path}, which is neither data nor a function of torch.nn.functional")


def _import(name: Global, installed: Installed) -> Any:
    """The object, if it is defined where its name says: nothing imported from elsewhere, nothing made up."""
    if not installed.defines(name.module, name.name):
        raise RefusedError(f"uses {name.path} as no saved module does")
    try:
        value = vars(import_mended(name.module)).get(name.name)
    except Exception as error:
        raise RewriteError(f"needs {name.module}, whose import fails: {why_import_fails(error)}") from None
    if (getattr(value, "__module__", None), getattr(value, "__qualname__", None)) != (name.module, name.name):
        raise RefusedError(f"names {name.path}, which is not defined there")
    return value


def _is_on_tensors(name: str) -> bool:
    """Of torch's functions those that are tensor methods too, such as `tanh`. Others may write: `from_file`."""
    return not name.startswith("_") and hasattr(torch.Tensor, name)


def _torch_function(owner: object, name: str) -> Any:
    """All that `getattr` may do."""
    if owner is not _TORCH_FUNCTIONS or not _is_on_tensors(name):
        raise ValueError(f"{name!r} is no function on tensors")
    return getattr(owner, name)


_STAND_INS: dict[str, Any] = {
    _GETATTR: _torch_function,
    "functools.partial": partial,
    "builtins.frozenset": frozenset,
    "builtins.slice": slice,
}


# ---- by what is set on the objects -----------------------------------------------------------------------


def _check_states(node: Node, allowed: dict[str, Any]) -> None:
    for state in node.states:
        if node.callee == "functools.partial":
            usual = isinstance(state, Node) and state.kind == "tuple" and len(state.items) == 4
            if not usual or state.items[3] is not None:
                raise RefusedError("changes a functools.partial")
            continue
        if not isinstance(state, Node) or state.kind != "dict":
            raise RefusedError(f"gives {node.callee} a state that is no dict")
        for key, value in zip(state.entries[::2], state.entries[1::2], strict=True):
            _check_attribute(node.callee, key, value, allowed)


def _check_attribute(owner: str, key: object, value: Any, allowed: dict[str, Any]) -> None:
    """No attribute takes a method's place, no hook is set, and a child is a module."""
    cls = allowed[owner]
    if not isinstance(key, str) or callable(getattr(cls, key, None)):
        raise RefusedError(f"replaces {owner}.{key}")
    if not issubclass(cls, nn.Module):
        return
    mapping = isinstance(value, Node) and value.is_mapping
    if _HOOKS.fullmatch(key) and not (value is None or (mapping and all(map(_is_ours, value.entries[1::2])))):
        raise RefusedError(f"sets {key} on a {owner}, and hooks are not loaded safely")
    if key == "_modules":
        children = value.entries[1::2] if mapping else [value]
        if not all(child is None or _is_module_node(child, allowed) for child in children):
            raise RefusedError(f"gives a {owner} a child that is no module")


def _is_ours(hook: Any) -> bool:
    """Whether an entry among a module's hooks is one of ours, or says of one that it is always called."""
    return hook is True or (isinstance(hook, Node) and hook.kind == "new" and hook.callee in _OURS)


def _is_module_node(value: Any, allowed: dict[str, Any]) -> bool:
    return isinstance(value, Node) and value.kind == "new" and _is_module_class(allowed[value.callee])
