"""A model to try passes on, with its captures: as it is, in bfloat16, on the meta device; and a model beside it that
takes the same inputs and has nothing to change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError
from rewrite.frontend.capture import capture
from rewrite.graph.program import Program
from rewrite.torch_private import pytree

from .observe import observe


class Bare(nn.Module):
    """Its inputs, reversed along their last axis: no parameter, no layer, nothing saved for a backward."""

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [t.flip(-1) if t.dim() else t.clone() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]


class Subject:
    """A model (or its program) and example inputs. Each capture is made once, when it is first asked for.

    One subject serves any number of passes. A program has no model behind it: what needs one is then not checked.
    """

    def __init__(
        self, model: nn.Module | Program, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.model = None if isinstance(model, Program) else model
        if isinstance(model, Program):
            self.program = model
            args, kwargs = args or model.example_args, kwargs or model.example_kwargs
        self.args, self.kwargs = tuple(args), dict(kwargs or {})

    @cached_property
    def program(self) -> Program:
        """The model as it is."""
        assert self.model is not None
        return capture(self.model, self.args, self.kwargs)

    @cached_property
    def bare(self) -> Program | None:
        """A model that takes the same inputs and has no place for any pass; None where it is not to be had."""
        try:
            return capture(Bare(), self.args, self.kwargs)
        except RewriteError:
            return None

    @cached_property
    def bfloat16(self) -> Program | None:
        """The model in bfloat16; None where it is not to be had."""
        return self._cast(torch.bfloat16)

    @cached_property
    def cast_outputs(self) -> list[Tensor] | None:
        """What the program gives once it is cast to bfloat16, in training and in evaluation; None where it does not run."""
        try:
            return cast_outputs(self.program)
        except Exception:
            return None

    @cached_property
    def meta(self) -> Program | None:
        """The model without its values; None where it is not to be had."""
        return self._cast(torch.device("meta"))

    def _cast(self, to: torch.dtype | torch.device) -> Program | None:
        if self.model is None:
            return None
        args, kwargs = moved((self.args, self.kwargs), to)
        try:
            return capture(copy.deepcopy(self.model).to(to), args, kwargs)
        except (RewriteError, RuntimeError):
            return None


def moved(value: Any, to: torch.dtype | torch.device) -> Any:
    """Containers with their tensors on a device, or with their floating tensors in a dtype."""
    fits: Callable[[Tensor], bool] = lambda t: t.is_floating_point() or isinstance(to, torch.device)  # noqa: E731
    return pytree.tree_map_only(Tensor, lambda t: t.to(to) if fits(t) else t, value)


def cast_outputs(program: Program) -> list[Tensor]:
    """What a program gives once it is cast to bfloat16, in training and then in evaluation."""
    module = program.clone().module.to(torch.bfloat16)
    args, kwargs = moved((program.example_args, dict(program.example_kwargs)), torch.bfloat16)
    return [*observe(module, args, kwargs, train=True).outputs, *observe(module, args, kwargs, train=False).outputs]
