"""Parameters as functions of older ones: what a pass computed, said so that it can be evaluated again and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Compute = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class ParameterMap:
    """``compute(*sources)``: each source is the name of a tensor before the pass, or a map that was made earlier in it.

    ``compute`` is made of differentiable operators and keeps to the dtype of what it is given.
    """

    compute: Compute
    sources: tuple[str | ParameterMap, ...]

    def evaluate(self, tensor: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The value, from the tensors that ``tensor`` gives for names."""
        given = (s.evaluate(tensor) if isinstance(s, ParameterMap) else tensor(s) for s in self.sources)
        return self.compute(*given)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors before the pass that the value depends on, each once."""
        inner = (s.names if isinstance(s, ParameterMap) else (s,) for s in self.sources)
        return tuple(dict.fromkeys(name for names in inner for name in names))

    def bare(self) -> ParameterMap:
        """The map without the values of new entries, where its function can do without them: to be kept."""
        sources = tuple(s.bare() if isinstance(s, ParameterMap) else s for s in self.sources)
        bare = getattr(self.compute, "bare", None)
        return ParameterMap(self.compute if bare is None else bare(), sources)


@dataclass(frozen=True)
class Constant:
    """What a tensor that is new in a pass is before the pass changes it."""

    value: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """The tensor."""
        return self.value


@dataclass(frozen=True)
class Step:
    """How the parameters after a pass follow from those before it: modules get other names first, then each parameter at a
    path is what its map gives, or (None) something of its own; all others stay as they are.
    """

    names: Mapping[str, str]
    maps: Mapping[str, ParameterMap | None]
