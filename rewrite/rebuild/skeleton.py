"""Building a model for its shapes alone: parameters are on the meta device from the moment that a module takes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from rewrite.graph.home import is_record

from .settings import Path

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(module: nn.Module) -> Shapes:
    """The shape of every entry of a module's state_dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@contextmanager
def without_values() -> Iterator[None]:
    """What is built within has its parameters on the meta device; its buffers have the values that its code gives them.

    A module that is built so and given a state_dict (``assign=True``) is whole. The random state is left as it was.
    """

    def on_parameter(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta or type(parameter) is not nn.Parameter:
            return None
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(on_parameter)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        hook.remove()


@dataclass
class Arguments:
    """What the constructors of a class were given, along its bases: arguments by name."""

    kind: type[nn.Module]
    found: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within, the first instance of the class that is built is watched: its constructors have set nothing yet when
        the first child is registered, so that their arguments stand in their frames.
        """
        seen: list[nn.Module] = []

        def on_module(module: nn.Module, name: str, child: Any) -> None:
            if type(module) is self.kind and not seen:
                seen.append(module)
                self._read(module)

        hook = register_module_module_registration_hook(on_module)
        try:
            yield
        finally:
            hook.remove()

    def _read(self, module: nn.Module) -> None:
        frame = sys._getframe()
        while frame is not None:
            given = inspect.getargvalues(frame)
            if frame.f_code.co_name == "__init__" and given.args and given.locals.get(given.args[0]) is module:
                code = frame.f_code
                names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
                for name in names:
                    self.found.setdefault(name, given.locals.get(name))
            frame = frame.f_back  # type: ignore[assignment]


@dataclass
class Asked:
    """Which settings of a configuration a build reads, at what path, and which it asks for that are not there."""

    read: set[Path] = field(default_factory=set)
    absent: set[Path] = field(default_factory=set)

    def watch(self, config: Any, path: Path = ()) -> None:
        """Note from now on what is read of a configuration and its sections. It becomes of another class: throw it away."""
        for name, held in list(vars(config).items()):
            if is_record(held) and not name.startswith("_"):
                self.watch(held, (*path, name))
        config.__class__ = _noting(type(config), self, path)

    def leaves(self, found: Iterator[tuple[Path, Any]]) -> dict[Path, Any]:
        """Those of the settings that are read, and the absent ones as None."""
        known = {path: value for path, value in found if any(path[: len(r)] == r for r in self.read)}
        return {**known, **{path: None for path in sorted(self.absent, key=str) if path not in known}}


def _noting(kind: type, asked: Asked, path: Path) -> type:
    def read(self: Any, name: str) -> Any:
        noted = not name.startswith("_")
        try:
            value = kind.__getattribute__(self, name)  # type: ignore[call-arg]  # of an instance
        except AttributeError:
            asked.absent.update([(*path, name)] if noted else [])
            raise
        if noted and not callable(value):
            asked.read.add((*path, str(_own_name(kind, name))))
        return value

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})


def _own_name(kind: type, name: str) -> str:
    """The name under which a configuration keeps a setting that has another name as well."""
    return str(getattr(kind, "attribute_map", {}).get(name, name))


def shapes_built(build: Callable[[], nn.Module]) -> Shapes | None:
    """The shapes of what a function builds; None where it raises: these settings do not go together."""
    try:
        with without_values():
            return shapes_of(build())
    except Exception:  # whatever a library raises about settings that it was not made for
        return None
