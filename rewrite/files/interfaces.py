"""Calling conventions as JSON and back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from rewrite.errors import RewriteError
from rewrite.graph.conditions import Condition
from rewrite.graph.interface import Argument, Interface
from rewrite.sources.installed import Installed

from . import checked
from .checked import Json
from .specs import decode_outputs, decode_spec, encode_outputs, encode_spec
from .values import decode, encode


def encode_interface(interface: Interface) -> Json:
    """A calling convention; where a default or an output class has no JSON form, a plain one stands in."""
    parameters = [
        {"name": p.name, "kind": p.kind.name, **_encode_default(p)} for p in interface.signature.parameters.values()
    ]
    arguments = [
        {"name": a.name, "spec": encode_spec(a.spec), "leaves": list(a.leaves), "constants": encode(a.constants)}
        for a in interface.arguments
    ]
    return {
        "parameters": parameters,
        "arguments": arguments,
        "input_count": interface.input_count,
        "output_specs": [encode_outputs(s) for s in interface.output_specs],
        "shapes": [list(s) for s in interface.shapes],
        "conditions": [[c.expression, c.words] for c in interface.conditions],
        "dropped_outputs": list(interface.dropped_outputs),
    }


def _encode_default(parameter: inspect.Parameter) -> Json:
    if parameter.default is inspect.Parameter.empty:
        return {}
    try:
        return {"default": encode(parameter.default)}
    except RewriteError:
        return {"default": None}


def decode_interface(data: Json, installed: Installed) -> Interface:
    """The calling convention that ``encode_interface`` wrote. Raises RewriteError where it does not fit together."""
    checked.table(data, "interface", "parameters", "arguments", "input_count", "output_specs", "shapes", "conditions")
    parameters = [_decode_parameter(p) for p in checked.items(data["parameters"], "parameters", 10_000)]
    arguments = tuple(_decode_argument(a) for a in checked.items(data["arguments"], "arguments", 10_000))
    shapes = tuple(_decode_shape(s) for s in checked.items(data["shapes"], "shapes"))
    count = checked.whole(data["input_count"], "number of inputs", 0, len(shapes))
    places = sorted(place for argument in arguments for place in argument.leaves if place is not None)
    if places != list(range(count)) or count != len(shapes):
        raise RewriteError("its arguments do not fit its inputs")
    specs = checked.items(data["output_specs"], "output structures", 2)
    if len(specs) != 2:
        raise RewriteError("it has no output structure for each mode")
    try:
        signature = inspect.Signature(parameters)
        return Interface(
            signature,
            arguments,
            count,
            (decode_outputs(specs[0], installed), decode_outputs(specs[1], installed)),
            shapes,
            tuple(_decode_condition(c, shapes) for c in checked.items(data["conditions"], "conditions", 10_000)),
            tuple(checked.text(d, "output") for d in checked.items(data.get("dropped_outputs", []), "outputs")),
        )
    except ValueError as error:
        raise RewriteError(f"its interface does not hold: {error}") from None


def _decode_parameter(data: Json) -> inspect.Parameter:
    checked.table(data, "parameter", "name", "kind")
    kind = inspect._ParameterKind.__members__.get(checked.text(data["kind"], "kind of parameter"))
    if kind is None or data["name"] == "self":
        raise RewriteError(f"its parameter {checked.shown(data['name'])} is of no kind")
    variadic = kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    default = decode(data["default"]) if "default" in data and not variadic else inspect.Parameter.empty
    return inspect.Parameter(checked.name(data["name"], "parameter"), kind, default=default)


def _decode_argument(data: Json) -> Argument:
    checked.table(data, "argument", "name", "spec", "leaves", "constants")
    spec = decode_spec(data["spec"])
    leaves = checked.items(data["leaves"], "leaves", spec.num_leaves)
    places = tuple(None if place is None else checked.whole(place, "input", 0) for place in leaves)
    constants = decode(data["constants"])
    if not isinstance(constants, tuple) or not len(constants) == len(places) == spec.num_leaves:
        raise RewriteError(f"its argument {checked.shown(data['name'])} does not fit its structure")
    return Argument(checked.name(data["name"], "argument"), spec, places, constants)


def _decode_shape(data: Json) -> tuple[int | None, ...]:
    return tuple(None if s is None else checked.size(s) for s in checked.items(data, "shape", checked.DIMENSIONS))


def _decode_condition(data: Json, shapes: Sequence[tuple[int | None, ...]]) -> Condition:
    """A condition on sizes that the inputs have."""
    if not isinstance(data, list) or len(data) != 2:
        raise RewriteError("one of its conditions on sizes is none")
    condition = Condition(checked.text(data[0], "condition"), checked.text(data[1], "condition"))
    if len(condition.words) > 10_000:
        raise RewriteError("one of its conditions on sizes is too long")
    condition.check()
    known = {f"s{i}_{axis}" for i, shape in enumerate(shapes) for axis in range(len(shape))}
    unknown = condition.names() - known
    if unknown:
        raise RewriteError(f"one of its conditions is on {checked.shown(min(unknown))}, which is no size of an input")
    return condition
