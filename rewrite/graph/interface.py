"""How a captured model is called: its signature, which leaves are graph inputs, and how outputs are put together."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.torch_private import pytree

from .conditions import Condition, broken

Signature = inspect.Signature
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Argument:
    """One argument of the model's ``forward`` as it was at capture.

    ``leaves`` holds, for each leaf of the argument's pytree, the position of its graph input or, where the leaf was no
    tensor, ``None``; ``constants`` holds the value of each such leaf.
    """

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[int | None, ...]
    constants: tuple[Any, ...]


@dataclass(frozen=True)
class Interface:
    """The calling convention of a program: ``forward``'s signature, the captured arguments, the output structure.

    ``shapes`` holds each graph input's sizes, None where a size is dynamic; ``conditions`` are what else the capture
    assumed of them.
    """

    signature: Signature
    arguments: tuple[Argument, ...]
    input_count: int
    output_specs: tuple[pytree.TreeSpec, pytree.TreeSpec]
    shapes: tuple[tuple[int | None, ...], ...] = ()
    conditions: tuple[Condition, ...] = ()
    dropped_outputs: tuple[str, ...] = ()
    _checks: list[tuple[Condition, Callable[..., bool]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # made here and not when first used: torch.compile cannot trace a cached property
        object.__setattr__(self, "_checks", [(condition, condition.check()) for condition in self.conditions])

    def enter(self, values: Mapping[str, Any]) -> list[Any]:
        """Map argument values to the flat list of graph inputs.

        Raises TypeError for an argument that the capture did not see, ValueError where a captured constant differs.
        """
        flat: list[Any] = [None] * self.input_count
        seen = set()
        for argument in self.arguments:
            seen.add(argument.name)
            if argument.name not in values:
                if all(place is None for place in argument.leaves):
                    continue
                raise TypeError(
                    f"missing argument {argument.name!r}: the model was captured with it; give it, or capture without it"
                )
            self._enter_argument(argument, values[argument.name], flat)
        for name, value in values.items():
            if name not in seen and value is not None and not self._is_default(name, value):
                raise TypeError(f"argument {name!r} was not given at capture; capture the model with it to use it")
        for value, shape in zip(flat, self.shapes, strict=False):
            self._check_shape(value, shape)
        words = broken(self._checks, flat)
        if words is not None:
            raise ValueError(f"the capture only holds while {words}: capture the model again with such inputs")
        return flat

    def _check_shape(self, value: Any, shape: tuple[int | None, ...]) -> None:
        """A size that the capture baked into the graph must be met, or the result would be silently wrong."""
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"the graph takes a tensor of shape {_shape_text(shape)}, got {type(value).__name__}")
        if value.dim() != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=True)):
            raise ValueError(
                f"an input of shape {tuple(value.shape)} where the capture fixed {_shape_text(shape)}: "
                "capture the model again with such inputs"
            )

    def _enter_argument(self, argument: Argument, value: Any, flat: list[Any]) -> None:
        if len(argument.leaves) == 1 and argument.leaves[0] is not None and isinstance(value, torch.Tensor):
            flat[argument.leaves[0]] = value
            return
        leaves, spec = pytree.tree_flatten(value)
        if len(leaves) == 1 and argument.leaves == (None,):
            self._check_constant(argument.name, argument.constants[0], leaves[0])
            return
        if spec != argument.spec:
            captured = "a tensor" if argument.spec.is_leaf() else str(argument.spec)
            raise ValueError(
                f"argument {argument.name!r} was captured as {captured}; got {type(value).__name__}: "
                "capture the model again with that value"
            )
        for place, constant, leaf in zip(argument.leaves, argument.constants, leaves, strict=True):
            if place is None:
                self._check_constant(argument.name, constant, leaf)
            else:
                flat[place] = leaf

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self.signature.parameters.get(name)
        return parameter is not None and (value is parameter.default or value == parameter.default)

    def _check_constant(self, name: str, captured: Any, given: Any) -> None:
        if given is captured or (not isinstance(given, torch.Tensor) and given == captured):
            return
        if given is None:
            return
        what = "a tensor" if isinstance(given, torch.Tensor) else repr(given)
        raise ValueError(
            f"argument {name!r} was captured as {captured!r} and is part of the graph; "
            f"got {what}: capture the model again with that value"
        )

    def leave(self, outputs: Sequence[Any], training: bool) -> Any:
        """Rebuild the model's output structure (which may differ by mode) from the graph's flat outputs."""
        spec = self.output_specs[0 if training else 1]
        return pytree.tree_unflatten(list(outputs)[: spec.num_leaves], spec)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flat graph inputs for a call ``model(*args, **kwargs)``."""
        return self.enter(named_arguments(self.signature, args, kwargs))


def named_arguments(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; ``*args`` become ``name_0``, ``name_1``, ..., entries of ``**kwargs`` stand under their key."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise RewriteError(f"the inputs do not fit the model's signature {_short(signature)}: {error}") from None
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values.update({f"{name}_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    return values


def _short(signature: Signature) -> str:
    names = [str(p.replace(annotation=inspect.Parameter.empty)) for p in signature.parameters.values()]
    return "(" + ", ".join(names) + ")"


def _shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"


def make_forward(interface: Interface, run: Callable[..., Any]) -> Callable[..., Any]:
    """A ``forward(self, ...)`` with the model's own parameters, over ``run(self, *flat_inputs)``.

    The text of the function spells the parameters out, so that torch.export and torch.compile see the true signature.
    """
    own = _own_prefix(interface.signature)
    names: dict[str, Any] = {f"{own}run": run, f"{own}interface": interface, f"{own}enumerate": enumerate}
    declared: list[str] = []
    packed: list[str] = []
    keyword_only = False
    parameters = list(interface.signature.parameters.values())
    constants = {
        a.name: pytree.tree_unflatten(list(a.constants), a.spec)
        for a in interface.arguments
        if all(place is None for place in a.leaves)
    }
    for i, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
                declared.append("*")
            keyword_only = True
        # what is left out is what it was at capture; the signature that is shown has the model's own default
        declared.append(_declare(parameter, constants.get(parameter.name, parameter.default), f"{own}default_{i}", names))
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and (
            i + 1 == len(parameters) or parameters[i + 1].kind is not parameter.kind
        ):
            declared.append("/")
        packed.append(_pack(parameter, own))
    source = (
        f"def forward(self, {', '.join(declared)}):\n"
        f"    {own}values = {{{', '.join(packed)}}}\n"
        f"    return {own}interface.leave({own}run(self, *{own}interface.enter({own}values)), self.training)\n"
    )
    exec(compile(source, "<rewrite.forward>", "exec"), names)
    forward: Callable[..., Any] = names["forward"]
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY:
        self_parameter = self_parameter.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = interface.signature.replace(  # type: ignore[attr-defined]
        parameters=[self_parameter, *parameters], return_annotation=inspect.Signature.empty
    )
    return forward


def _own_prefix(signature: Signature) -> str:
    """The beginning of names that no parameter has; parameters that are no identifiers cannot be written at all."""
    for name in signature.parameters:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"the parameter {name[:60]!r} is no identifier")
    prefix = "_of_forward_"
    while any(name.startswith(prefix) for name in signature.parameters):
        prefix = f"_{prefix}"
    return prefix


def _declare(parameter: inspect.Parameter, default: Any, name: str, names: dict[str, Any]) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    names[name] = default
    return f"{parameter.name}={name}"


def _pack(parameter: inspect.Parameter, own: str) -> str:
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        numbered = f"{own}i, {own}v in {own}enumerate({parameter.name})"
        return f"**{{f'{parameter.name}_{{{own}i}}': {own}v for {numbered}}}"
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return f"{parameter.name!r}: {parameter.name}"
