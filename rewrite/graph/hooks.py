"""Properties on a module of the user's: hooks around its forward, copied and pickled with it, that a capture reads back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.torch_private import frame_compiler, pytree

from .properties import frozen, known, ranked, thawed, uncompiled

_uncompiled = functools.partial(uncompiled, within=True)
_MARK = "rewrite "
"""Begins the keys of our hooks in a module: numbers, as torch gives, begin anew in each process and would collide."""

_entered: ContextVar[tuple[AbstractContextManager[Any], ...]] = ContextVar("contexts around running forwards", default=())


@dataclass(frozen=True)
class Enter:
    """A hook on a module of the user's: enters the context of a property before its forward."""

    name: str
    value: Any

    @uncompiled
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.enter(module, args, kwargs, frame_compiler() is not None)

    @_uncompiled
    def enter(self, module: nn.Module, args: Any, kwargs: Any, is_compiled: bool) -> None:
        """Enter the context of a forward that is compiled, or is not."""
        inputs = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        around = known(self.name).context(is_compiled)
        context = nullcontext() if around is None else around(module, inputs, frozen(self.value))
        context.__enter__()
        _entered.set((*_entered.get(), context))


@dataclass(frozen=True)
class Leave:
    """The hook that leaves the innermost context after the forward, also where that raised."""

    @_uncompiled
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        *outer, context = _entered.get()
        _entered.set(tuple(outer))
        context.__exit__(None, None, None)


def hang(model: nn.Module, properties: Mapping[str, Any]) -> None:
    """Let a module of the user's run under these properties and no others, by hooks that are copied and pickled with it."""
    take_down(model)
    before, with_keywords, after, always = _held(model)
    for name in ranked(properties):
        before[_MARK + name] = Enter(name, thawed(properties[name]))
        with_keywords[_MARK + name] = True
        after[_MARK + name] = Leave()
        always[_MARK + name] = True


def hung(model: nn.Module) -> Mapping[str, Any]:
    """The properties that a module of the user's runs under."""
    hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Enter)]
    return {hook.name: hook.value for hook in hooks}


def take_down(model: nn.Module) -> None:
    """Take the hooks off again."""
    for held in _held(model):
        for key in [key for key in held if isinstance(key, str) and key.startswith(_MARK)]:
            del held[key]


def _held(model: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where torch keeps a module's hooks; which take keywords, and which are called where the forward raised, too."""
    before, with_keywords = model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs
    return before, with_keywords, model._forward_hooks, model._forward_hooks_always_called
