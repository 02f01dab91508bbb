"""How each ATen operator treats the dimensions of its arguments: a table of rules, which third parties may extend.

A rule is given a ``Call`` and returns the dimensions of the value (a list of them for each part where there are several).
Operators that work element by element need none: their schema tells. An operator without a rule makes its axes rigid.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.nodes import aten, overload, packet

from .call import Axes, Call

Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
"""By the name of the operator, such as ``aten.cat``."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by their names: `cat` is one of ATen, `mylib.scan` one of a library's own."""

    def register(function: Rule) -> Rule:
        RULES.update((name if "." in name else f"aten.{name}", function) for name in names)
        return function

    return register


def by_operator(call: Call) -> Any:
    """The dimensions of what an operator gives."""
    if call.node.target is operator.getitem:
        found = call.known.get(call.node.args[0])  # type: ignore[arg-type]
        place = call.node.args[1]
        if isinstance(found, list | tuple) and isinstance(place, int) and place < len(found):
            return found[place]
        return call.unruled("getitem")
    found = RULES.get(str(packet(call.node)))
    if found is not None:
        return found(call)
    if not call.all_sizes:
        return None  # a number
    if _is_elementwise(call.node):
        return elementwise(call)
    return call.unruled(str(packet(call.node) or call.node.target))


_NAMES = """
hardswish hardswish_ hardsigmoid hardsigmoid_ silu_ relu_ relu6 relu6_ leaky_relu_ elu_ mish_
__and__ __or__ __xor__ logical_and logical_or logical_xor logical_not floor_divide
clone contiguous detach alias to _to_copy type_as dropout dropout_ native_dropout lift_fresh_copy where masked_fill
masked_fill_ copy_ copy fill_ zero_ zeros_like ones_like empty_like full_like rand_like randn_like bernoulli bernoulli_
nan_to_num lerp conj resolve_conj resolve_neg expand_as cumsum cumprod logcumsumexp feature_dropout
requires_grad_ detach_ normal_ uniform_ hardtanh softplus isnan isinf isfinite real imag polar complex
"""
_ELEMENTWISE = frozenset(_NAMES.split())
_SUMS = (aten.add, aten.add_, aten.sub, aten.sub_)


_FORMS = frozenset(
    {"view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "slice", "select", "narrow"}
) | {"permute", "transpose", "t", "contiguous", "clone", "alias", "detach", "to", "_to_copy"}
"""Operators whose result holds numbers of what they are given, in another form."""


def _is_formed(node: Node) -> bool:
    return getattr(packet(node), "__name__", "") in _FORMS


def is_added(node: Node) -> bool:
    """Whether a value, in whatever form, is added to others, as a bias is, or a table of positions."""
    sums = (user for user in node.users if packet(user) in _SUMS)
    return any(len(user.all_input_nodes) > 1 for user in sums) or any(is_added(u) for u in node.users if _is_formed(u))


def _behind(call: Call, value: Node) -> torch.Tensor | None:
    """The parameter or buffer that a value is another form of."""
    while _is_formed(value) and isinstance(value.args[0], Node):
        value = value.args[0]
    return call.tensor_of(value)


def _is_elementwise(node: Node) -> bool:
    found = overload(node)
    if found is None:
        return False
    return torch.Tag.pointwise in found.tags or packet(node).__name__ in _ELEMENTWISE


def elementwise(call: Call) -> Any:
    """Every axis is one with those that it is broadcast against."""
    given = [axes for _, axes in call.tensors()]
    found = call.broadcast(given, call.sizes)
    role = "added" if packet(call.node) in _SUMS else "elementwise"
    for node, axes in call.tensors():
        tensor = _behind(call, node)
        if tensor is not None:
            roots = {dim.root() for dim in axes}
            for axis, dim in enumerate(call.notes.axes_of(tensor)):
                if dim.root() in roots:
                    call.role(tensor, axis, role)
            if role == "added":
                _note_shift(found, axes)
    parts = [found if sizes == call.sizes else call.broadcast(given, sizes) for sizes in call.all_sizes]
    return parts if call.gives_several else found


def _note_shift(whole: Axes, added: Axes) -> None:
    """Note where one number is added to all entries of a dimension, those that are new as well."""
    lead = len(whole) - len(added)
    for i, dim in enumerate(whole):
        if dim.size > 1 and (i < lead or added[i - lead].size == 1):
            dim.use("shift")


def roles(call: Call, name: str, roles: dict[int, str]) -> None:
    """Note what the axes of a parameter among the arguments do."""
    held = call.held(call.named.get(name))
    for axis, role in roles.items():
        if held is not None and -len(held[1]) <= axis < len(held[1]):
            call.role(held[0], held[1][axis], role)
