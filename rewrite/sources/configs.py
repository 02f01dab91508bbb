"""What a transformers model's configuration says, asked together with its sections."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewrite.errors import RewriteError

from .input_text import GRAMMAR, Draw


def cannot_infer(model: nn.Module, why: str) -> RewriteError:
    """That a model's inputs must be said, and how."""
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    takes = f"forward takes ({', '.join(wanted)})" if wanted else "see its forward"
    return RewriteError(
        f"no example inputs for {type(model).__name__}: {why}; {takes}: "
        f"pass --inputs ({GRAMMAR}), or give the class an attribute `example_inputs`"
    )


def is_config(value: Any) -> bool:
    """Whether a value is a configuration of transformers."""
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


@dataclass(frozen=True)
class Config:
    """A configuration and its sections (`text_config`, `vision_config`, ...), asked together."""

    root: Any

    def sections(self, kind: str = "") -> list[tuple[str, Any]]:
        """The root and all nested configurations by name; those whose name holds `kind` follow the root first."""
        found = [("", self.root)]
        for _, config in found:
            found += [(name, value) for name, value in vars(config).items() if is_config(value)]
        return [found[0], *sorted(found[1:], key=lambda pair: kind not in pair[0])]

    def get(self, *names: str, kind: str = "") -> Any:
        """The first of the settings `names` that is not None, the root's before a section's; None if there is none."""
        values = (getattr(config, name, None) for _, config in self.sections(kind) for name in names)
        return next((value for value in values if value is not None), None)

    def number(self, *names: str, kind: str = "", default: int) -> int:
        """As `get`, the first element of a sequence."""
        value = self.get(*names, kind=kind)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def tokens(self, pattern: str) -> dict[str, int]:
        """Settings such as `pad_token_id` whose name matches, with the ids they hold."""
        pairs = [pair for _, config in self.sections() for pair in vars(config).items()]
        return {name: n for name, n in pairs if type(n) is int and re.fullmatch(pattern, name)}


@dataclass(frozen=True)
class Asked:
    """A model whose inputs are asked for: its configuration, the names that its forward takes, and what draws values."""

    model: nn.Module
    config: Config
    names: frozenset[str]
    draw: Draw
