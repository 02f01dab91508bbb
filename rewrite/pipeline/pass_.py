"""The class of all passes: a frozen dataclass whose fields are its options.

The options' one description gives the pipeline text, the `--help`, the table in the docs and the JSON report.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from rewrite.errors import OptionError, RewriteError, did_you_mean
from rewrite.proof.contract import NoFormulaError

from .option_types import Bounds, OptionType, bounded, option_type
from .text import Element, print_pipeline

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rewrite.graph.program import Program
    from rewrite.proof.contract import Contract
    from rewrite.proof.part import Part

    from .context import Context

Json = bool | int | float | str | None
T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    finite: bool = False,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> T:
    """An option's default with its line of help: `alpha: float = option(0.5, "value at the start", finite=True)`.

    The bounds say which numbers an int or float accepts; any of them refuses nan, ``finite`` also the infinities.
    """
    bounds = Bounds(finite, above, at_least, below, at_most)
    field: T = dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})
    return field


class Pass(abc.ABC):
    """A named rewrite of a program.

    A subclass is a `@dataclass(frozen=True)` that sets `name`, and whose fields are its options: each a bool,
    int, float, str, `Selector`, `Literal`, enum, or one of these `| None`, with a default. Values are checked
    when the pass is made (`OptionError`); an int becomes a float and a text a `Selector` where the field is
    one. A subclass with its own `__post_init__` calls this one first.

    `inserts` are the classes of its own layers: a model that holds them is captured with them as they are. `absence` says
    what a model lacks in which the pass finds no place at all, and what makes one if anything does.
    """

    name: ClassVar[str]
    inserts: ClassVar[tuple[type, ...]] = ()
    absence: ClassVar[str] = ""

    if TYPE_CHECKING:

        def __init__(self, **options: Any) -> None: ...

    def __post_init__(self) -> None:
        for name, kind in _option_types(type(self)).items():
            value = _converted(type(self), name, kind, kind.accept, getattr(self, name))
            object.__setattr__(self, name, value)

    @abc.abstractmethod
    def contract(self) -> Contract:
        """What the pass promises to keep; the engine proves it after each run."""

    def run(self, program: Program, context: Context) -> None:
        """Rewrite the program in place, through the edit layer only. A pass made of passes has `steps` instead."""
        for step in self.steps(program, context):
            step.run(program, context)

    def steps(self, program: Program, context: Context) -> Sequence[Pass]:
        """For a pass made of passes: which, in order. Each is run, proven and recorded by itself, by its own contract.

        They are chosen on a copy of the program before (what to rewrite, by data say), and handed what was chosen as
        options. None may promise less than the whole does.
        """
        return ()

    def reference(self, old: nn.Module | None, new: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """The method's formula for a new layer, written apart from it: the proof compares the two, gradients included.

        A pass whose forward is CLOSE or NEW must have it, or `formula`. `new` holds the parameters and cannot be called,
        `old` is what stood there.
        """
        raise NoFormulaError(f"pass {self.name} gives no formula of what it inserts: it needs reference() or formula()")

    def formula(self, part: Part, *inputs: torch.Tensor) -> Any:
        """The method's formula for a part of the graph: its outputs, from the values that flow into it.

        For a pass whose parts are more than one layer each; by default `reference` is asked for the one layer. Inputs
        come in the order in which the graph makes them, for a single layer in that of its arguments.
        """
        pair = part.replaced
        if pair is None:
            raise NoFormulaError(f"pass {self.name} gives no formula of a part with several layers: it needs formula()")
        return self.reference(*pair, *inputs)

    def gradient(self, part: Part, inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor]) -> Any:
        """For a gradient that is an ESTIMATE: what the method says it is, for each input of the part (its mean, if drawn).

        Returns the gradients in the order of the inputs, None for one without, or the pair of these and of a dict with the
        gradients of parameters by name.
        """
        raise NoFormulaError(f"pass {self.name} gives no formula of its gradient: it needs gradient()")

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """The pass with these options, each given as text.

        Raises `OptionError` for an unknown option, naming the nearest, and for a value of the wrong type.
        """
        kinds = _option_types(cls)
        for name in options:
            if name not in kinds:
                known = f"it has {', '.join(kinds)}" if kinds else "it has none"
                hint = did_you_mean(name, kinds) or f"; {known}"
                raise OptionError(f"pass '{cls.name}' has no option '{name}'{hint}", name)
        return cls(**{name: _converted(cls, name, kinds[name], kinds[name].parse, text) for name, text in options.items()})

    @property
    def text(self) -> str:
        """The pass as pipeline text, with the options that differ from their defaults."""
        default = type(self)()
        shown = [
            (name, _shown(self, name, kind), _shown(default, name, kind)) for name, kind in _option_types(type(self)).items()
        ]
        changed = tuple((name, text) for name, text, standard in shown if text != standard)
        return print_pipeline([Element(self.name, changed)])

    def options(self) -> dict[str, Json]:
        """All options as JSON values; a selector, an enum and a float that JSON lacks are given as text."""
        return {name: _json(getattr(self, name), kind) for name, kind in _option_types(type(self)).items()}


@dataclass(frozen=True)
class OptionDescription:
    """One option: its name, its type in words, its default as text and as a JSON value, a line of help.

    ``accepts`` says which of the type's values it takes, where not all: "finite, above 0".
    """

    name: str
    type: str
    default: str
    default_value: Json
    help: str
    accepts: str = ""


@dataclass(frozen=True)
class PassDescription:
    """What a user is told about a pass: `summary` is the first line of its docstring `doc`."""

    name: str
    summary: str
    doc: str
    options: tuple[OptionDescription, ...]


def describe(pass_class: type[Pass]) -> PassDescription:
    """The description of a pass class, the one source of its help, its docs and its part of the report.

    Raises `RewriteError` when the class is not a frozen dataclass, or an option lacks a default, has a type
    that options cannot have, or a name that `Pass` itself uses.
    """
    kinds = _option_types(pass_class)
    default = pass_class()
    options = tuple(_describe_option(default, name, kind) for name, kind in kinds.items())
    doc = _doc(pass_class)
    return PassDescription(pass_class.name, doc.partition("\n")[0], doc, options)


def _describe_option(default: Pass, name: str, kind: OptionType) -> OptionDescription:
    return OptionDescription(
        name=name,
        type=kind.label,
        default=_shown(default, name, kind),
        default_value=_json(getattr(default, name), kind),
        help=_as_dataclass(type(default)).__dataclass_fields__[name].metadata.get("help", ""),
        accepts=kind.accepts,
    )


@functools.cache
def _option_types(cls: type[Pass]) -> dict[str, OptionType]:
    """The option type of each field; raises `RewriteError` for a class that breaks the rules of `Pass`."""
    fields = dataclasses.fields(_as_dataclass(cls))
    hints = typing.get_type_hints(cls)
    kinds: dict[str, OptionType] = {}
    for field in fields:
        where = f"option '{field.name}' of pass class {cls.__name__}"
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RewriteError(f"{where} needs a default")
        if hasattr(Pass, field.name) or field.name == "name":
            raise RewriteError(f"{where} takes a name that every pass uses; rename it")
        try:
            kinds[field.name] = bounded(option_type(hints[field.name]), field.metadata.get("bounds", Bounds()))
        except RewriteError as error:
            raise RewriteError(f"{where}: {error}") from None
    return kinds


def _as_dataclass(cls: type[Pass]) -> Any:
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise RewriteError(f"pass class {cls.__name__} must be decorated with @dataclass(frozen=True)")
    return cls


def _converted(cls: type[Pass], name: str, kind: OptionType, convert: Any, value: object) -> Any:
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError):
        raise OptionError(f"option '{name}' of pass '{cls.name}' expects {kind.label}, got {value!r}", name) from None
    except RewriteError as error:
        raise OptionError(f"option '{name}' of pass '{cls.name}': {error}", name) from None


def _shown(pass_: Pass, name: str, kind: OptionType) -> str:
    text: str = _converted(type(pass_), name, kind, kind.show, getattr(pass_, name))
    return text


def _json(value: object, kind: OptionType) -> Json:
    if value is None or type(value) in (bool, int, str):
        return typing.cast(Json, value)
    if isinstance(value, float) and math.isfinite(value):
        return value
    return kind.show(value)


def _doc(cls: type[Pass]) -> str:
    doc = vars(cls).get("__doc__") or ""
    # a dataclass without a docstring gets its signature as one
    return "" if doc.startswith(f"{cls.__name__}(") else inspect.cleandoc(doc)
