"""Questions about single graph nodes that every analysis asks: values, purity, mutation, module paths, literals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.fx.node import Argument

from rewrite.torch_private import ASSERTION, OpOverload

from .codegen import fetch
from .ops import device_of, dtype_of

aten = torch.ops.aten


def tensor_value(node: Any) -> torch.Tensor | None:
    """The FakeTensor of a node that yields one tensor, else None."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def fixed_size(size: Any) -> int | None:
    """The number that a size is or was specialised to, None for a dynamic one."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else None
    return int(size)


def is_floating(node: Any) -> bool:
    """Whether a node yields one floating tensor."""
    value = tensor_value(node)
    return value is not None and value.is_floating_point()


def overload(node: Node) -> OpOverload | None:
    """The ATen (or custom) overload that a node calls, else None."""
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        return node.target
    return None


def packet(node: Node) -> Any:
    """The overload packet (``torch.ops.aten.add``) that a node calls, else None."""
    found = overload(node)
    return found._overloadpacket if found is not None else None


def mutated_arguments(node: Node) -> tuple[Node, ...]:
    """The argument nodes that an operator writes in place."""
    found = overload(node)
    if found is None or not found._schema.is_mutable:
        return ()
    written = []
    for place, argument in enumerate(found._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else [value]
            written += [v for v in values if isinstance(v, Node)]
    return tuple(written)


def is_random(node: Node) -> bool:
    """Whether an operator draws random numbers."""
    found = overload(node)
    return found is not None and torch.Tag.nondeterministic_seeded in found.tags


def is_pure(node: Node) -> bool:
    """Whether a node may be dropped when nobody uses its result."""
    if node.op == "call_module":
        return False
    found = overload(node)
    if found is None:
        return True
    return not found._schema.is_mutable and not is_random(node) and found is not ASSERTION


def is_differentiable_leaf(module: nn.Module, node: Node, reaches: bool) -> bool:
    """Whether a node's value may require grad, given whether any of its inputs may (``reaches``)."""
    value = tensor_value(node)
    if node.op == "placeholder":
        return value is not None and value.is_floating_point()
    if node.op == "get_attr":
        found = attribute(module, str(node.target))
        return isinstance(found, torch.Tensor) and found.requires_grad
    if packet(node) is aten.detach:
        return False
    return reaches and (value is None or value.is_floating_point() or value.is_complex())


def gives_kind_alone(node: Node) -> bool:
    """Whether a node reads a tensor of the model for its dtype or device alone."""
    return node.op == "get_attr" and bool(node.users) and all(user.target in (dtype_of, device_of) for user in node.users)


def attribute(module: nn.Module, path: str) -> Any:
    """The parameter, buffer, module or plain attribute at a dotted path, else None."""
    found: Any = module
    for part in path.split("."):
        found = fetch(found, part) if isinstance(found, nn.Module) else getattr(found, part, None)
        if found is None:
            return None
    return found


def module_stack(node: Node) -> tuple[tuple[str, str, str], ...]:
    """The module calls around a node, outermost first, as (call key, module path, class name).

    The key tells two calls of one module apart, the path does not.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, _clean_path(path), _class_name(kind)) for key, (path, kind) in stack.items())


def _clean_path(path: str) -> str:
    path = path.removeprefix("L['self']").lstrip(".")
    return path


def _class_name(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def module_key(node: Node) -> str:
    """The key of the innermost module call around a node, '' outside of any."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_path(node: Node) -> str:
    """The path of the innermost module around a node, '' for the root."""
    stack = module_stack(node)
    return stack[-1][1] if stack else ""


def call_arguments(node: Node) -> dict[str, Argument]:
    """An operator call's arguments by schema name, defaults filled in."""
    found = overload(node)
    if found is None:
        return {}
    named: dict[str, Argument] = {}
    for place, argument in enumerate(found._schema.arguments):
        if place < len(node.args):
            named[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def literal_arguments(node: Node) -> dict[str, Argument]:
    """An operator call's arguments by name; those of arithmetic on sizes, which has no schema, by their number."""
    if overload(node) is None and getattr(node.target, "__module__", "") == "_operator":
        return {str(place): value for place, value in enumerate(node.args)}
    return call_arguments(node)


def set_argument(node: Node, name: str, value: Argument) -> None:
    """Set an operator call's argument, by the name that ``literal_arguments`` gives it."""
    found = overload(node)
    if found is None:
        node.update_arg(int(name), value)
        return
    names = [a.name for a in found._schema.arguments]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of an argument: nodes and literals inside lists, tuples, dicts and slices."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument with ``change`` applied to each leaf, in the order of ````leaves````."""
    if isinstance(value, list | tuple):
        made = [map_leaves(v, change) for v in value]
        return tuple(made) if isinstance(value, tuple) else made
    if isinstance(value, dict):
        return {k: map_leaves(v, change) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(change(value.start), change(value.stop), change(value.step))
    return change(value)


def hint_of(size: Any) -> int:
    """The example's number for a size."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
