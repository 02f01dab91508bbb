"""A layer in the place of a user's module that is called with more than one tensor, or gives back more than a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import Program
from rewrite.numerics.compare import clone

Place = tuple[Any, ...]
"""Where a value stands among nested arguments: a position or keyword, then an index or key for each container."""


class Standing(nn.Module):
    """Hands one tensor of a call's arguments to ``layer``; what that gives stands where the module's tensor stood.

    ``taken`` is the place of the tensor, ``outputs`` what the module gave besides, with None at ``given``.
    """

    def __init__(self, layer: nn.Module, taken: Place, outputs: Any, given: Place) -> None:
        super().__init__()
        self.layer = layer
        self.taken, self.outputs, self.given = taken, outputs, given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = args if isinstance(self.taken[0], int) else kwargs
        for key in self.taken:
            found = found[key]
        return _filled(self.outputs, self.given, self.layer(found))


@dataclass(frozen=True)
class Call:
    """What a module was called with, and what it gave."""

    arguments: tuple[Any, Mapping[str, Any]]
    outputs: Any

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor in, by position, and one out."""
        args, kwargs = self.arguments
        return len(args) == 1 and not kwargs and all(isinstance(v, torch.Tensor) for v in (args[0], self.outputs))


def standing(path: str, layer: nn.Module, call: Call, like: torch.Tensor) -> nn.Module:
    """The layer as it can stand at ``path``: as it is, or told which argument it is given.

    ``like`` has the shape and dtype of the tensor that the program gives it. Raises RewriteError, by name, where the call
    does not tell which tensor that is, or the module gives back more tensors than one.
    """
    if call.is_plain:
        return layer
    args, kwargs = call.arguments
    fits = [(p, t) for p, t in (*tensors(args), *tensors(kwargs)) if (t.shape, t.dtype) == (like.shape, like.dtype)]
    given = [p for p, _ in tensors(call.outputs)]
    if len({id(t) for _, t in fits}) != 1 or len(given) != 1:
        raise RewriteError(
            f"the module at {path} is called with {len(fits)} tensors like the one that its new layer is given, "
            f"and gives back {len(given)}: your class cannot hold that layer; save the program as .pt2"
        )
    return Standing(layer, fits[0][0], _filled(call.outputs, given[0], None), given[0])


def calls_of(model: nn.Module, program: Program, paths: Sequence[str]) -> dict[str, Call]:
    """One call of each module of a copy of ``model``, in evaluation, on the example inputs of the program."""
    found: dict[str, Call] = {}
    copy = clone(model).eval()
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, outputs: Any, path: str = path) -> None:
            found.setdefault(path, Call((args, kwargs), outputs))

        copy.get_submodule(path).register_forward_hook(note, with_kwargs=True)
    kwargs = dict(program.example_kwargs)
    if "use_cache" in program.module.interface.signature.parameters:
        kwargs.setdefault("use_cache", False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            copy(*program.example_args, **kwargs)
        except Exception as error:
            raise RewriteError(f"your class does not run on the example inputs: {named_line(error)}") from error
    missing = next((path for path in paths if path not in found), None)
    if missing is not None:
        raise RewriteError(f"your class does not call {missing} on the example inputs: save the program as .pt2")
    return found


def tensors(value: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """The tensors among nested containers, each with its place."""
    if isinstance(value, torch.Tensor):
        yield place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        yield from tensors(inner, (*place, key))


def _filled(value: Any, place: Place, filling: Any) -> Any:
    """Nested containers with another value at a place; each container is a new one."""
    if not place:
        return filling
    if isinstance(value, Mapping):
        return type(value)({**value, place[0]: _filled(value[place[0]], place[1:], filling)})  # type: ignore[call-arg]
    items = list(value)
    items[place[0]] = _filled(items[place[0]], place[1:], filling)
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
