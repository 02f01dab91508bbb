"""How a model is built anew with other settings: by its configuration, by timm's name for it, by its own constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from torch import nn

from rewrite.errors import RewriteError, named_line
from rewrite.graph.home import Home
from rewrite.sources.compat import import_mended
from rewrite.sources.configs import is_config

from .settings import Path, edited, leaves
from .skeleton import Arguments, Asked, Shapes, shapes_built, without_values


class Maker(Protocol):
    """A way to build a class with its settings, some of them edited."""

    @property
    def settings(self) -> Mapping[Path, Any]:
        """The numbers among the settings that a build reads, and None for those that could be numbers."""
        ...

    def build(self, edits: Mapping[Path, Any]) -> nn.Module:
        """The model. Whatever the class raises about settings that do not go together is passed on."""
        ...


def maker_of(home: Home | None, before: Shapes) -> AnyMaker:
    """How a program's class is built, whose parameters had the shapes ``before``. Raises RewriteError, with the reason,
    where that is not known.
    """
    if home is None:
        raise RewriteError("it comes from a file, which does not tell how its class is built")
    if is_config(home.settings.get("config")) and hasattr(home.kind, "from_pretrained"):
        return ByConfig.of(home)
    name = _timm_name(home)
    return ByName.of(home, name, before) if name else ByClass.of(home)


@dataclass(frozen=True)
class ByConfig:
    """A transformers model: its class, called with a configuration."""

    kind: type[nn.Module]
    config: Any
    generation: Any
    settings: Mapping[Path, Any]

    @classmethod
    def of(cls, home: Home) -> ByConfig:
        config = home.settings["config"]
        if getattr(config, "auto_map", None):
            raise RewriteError(f"the code of {home.kind.__name__} lies in a folder of its own, and in no library")
        found = cls(home.kind, config, home.settings.get("generation_config"), {})
        return cls(home.kind, config, found.generation, found._asked())

    def _asked(self) -> Mapping[Path, Any]:
        """What a build reads; where a class does not take a configuration that is watched, all there is."""
        asked, watched = Asked(), edited(self.config, {})
        every = leaves(self.config)
        try:
            asked.watch(watched)
            with without_values():
                self.kind(watched)
        except Exception:  # a class may look its configuration's type up
            return dict(every)
        return asked.leaves(every)

    def build(self, edits: Mapping[Path, Any]) -> nn.Module:
        made = self.kind(edited(self.config, edits))
        if self.generation is not None:
            made.generation_config = edited(self.generation, {})
        return made

    def unwritable(self, edits: Mapping[Path, Any]) -> str:
        """What a configuration says against being written, which may be more than against being used; empty if nothing."""
        with TemporaryDirectory() as folder:
            try:
                edited(self.config, edits).save_pretrained(folder)
            except Exception as error:  # whatever a library holds against settings
                return named_line(error)
        return ""


@dataclass(frozen=True)
class ByName:
    """A timm model: the name of its architecture, with arguments."""

    kind: type[nn.Module]
    name: str
    given: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, home: Home, name: str, before: Shapes) -> ByName:
        arguments = Arguments(home.kind)
        bare = cls(home.kind, name, {}, {})
        try:
            with without_values(), arguments.noted():
                bare.build({})
        except Exception as error:
            raise RewriteError(f"timm cannot build {name} again: {named_line(error)}") from None
        plain = {k: v for k, v in arguments.found.items() if _is_plain(v) and k not in ("args", "kwargs")}
        named = {k: v for k, v in home.settings.items() if k in plain and _is_plain(v) and v is not None and v != plain[k]}
        return cls(home.kind, name, _given(named, lambda own: cls(home.kind, name, own, plain).build({}), before), plain)

    @property
    def settings(self) -> Mapping[Path, Any]:
        return dict(leaves({**self.defaults, **self.given}))

    def arguments(self, edits: Mapping[Path, Any]) -> dict[str, Any]:
        """What to pass beside the name."""
        changed = edited({**self.defaults, **self.given}, edits)
        return {key: changed[key] for key in {**self.given, **{str(path[0]): None for path in edits}}}

    def build(self, edits: Mapping[Path, Any]) -> nn.Module:
        timm = import_mended("timm")
        made: nn.Module = timm.create_model(self.name, pretrained=False, **self.arguments(edits))
        return made


@dataclass(frozen=True)
class ByClass:
    """A class of the user's own, by those arguments of its constructor that its instance holds as plain attributes."""

    kind: type[nn.Module]
    given: Mapping[str, Any]

    @classmethod
    def of(cls, home: Home) -> ByClass:
        given: dict[str, Any] = {}
        for parameter in list(inspect.signature(home.kind).parameters.values()):
            if parameter.name in home.settings and parameter.kind is not parameter.VAR_KEYWORD:
                given[parameter.name] = home.settings[parameter.name]
            elif parameter.kind is parameter.VAR_POSITIONAL or (
                parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            ):
                raise RewriteError(
                    f"the constructor of {home.kind.__name__} takes {parameter.name}, which its instance does not hold as a "
                    "plain attribute of that name"
                )
            elif parameter.kind is not parameter.VAR_KEYWORD and _is_plain(parameter.default):
                given[parameter.name] = parameter.default
        return cls(home.kind, given)

    @property
    def settings(self) -> Mapping[Path, Any]:
        return dict(leaves(dict(self.given)))

    def arguments(self, edits: Mapping[Path, Any]) -> dict[str, Any]:
        """What the constructor is called with."""
        made: dict[str, Any] = edited(dict(self.given), edits)
        return made

    def build(self, edits: Mapping[Path, Any]) -> nn.Module:
        return self.kind(**self.arguments(edits))


def _given(named: Mapping[str, Any], build: Callable[[Mapping[str, Any]], nn.Module], before: Shapes) -> dict[str, Any]:
    """Which attributes of an instance are what its class was called with: those that bring the shapes nearer to its own."""
    found: dict[str, Any] = {}

    def far(own: Mapping[str, Any]) -> float:
        shapes = shapes_built(lambda: build(own))
        return float("inf") if shapes is None else sum(shapes.get(name) != shape for name, shape in before.items())

    nearest = far(found) if named else 0.0
    for name, value in named.items():
        distance = far({**found, name: value}) if nearest else nearest
        if distance < nearest:
            found, nearest = {**found, name: value}, distance
    return found


AnyMaker = ByConfig | ByName | ByClass


def _timm_name(home: Home) -> str:
    for name in ("pretrained_cfg", "default_cfg"):
        held = home.settings.get(name)
        found = held.get("architecture") if isinstance(held, Mapping) else getattr(held, "architecture", None)
        if isinstance(found, str) and found:
            return found
    return ""


def _is_plain(value: Any) -> bool:
    """Whether JSON, or a record of such values, can hold it."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
