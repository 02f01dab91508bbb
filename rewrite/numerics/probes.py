"""Inputs and parameters to try a program with: fresh, perturbed, watched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rewrite.graph.program import Program
from rewrite.graph.tree import Places
from rewrite.torch_private import pytree

from .compare import on_copy, tensors
from .guard import sharing
from .randomness import seeded

Watcher = Callable[[tuple[torch.Tensor, ...], Any], None]
"""Told of one call of a layer: the tensors that it got, as they were, and what it gave."""


def watch(program: Program, watchers: Mapping[str, Watcher], args: Any, kwargs: Any, seed: int) -> tuple[torch.Tensor, ...]:
    """One evaluation run on a copy of ``program``, without gradients: its outputs.

    Each call of the layers at the paths of ``watchers`` is shown while it happens, so that no value has to be kept.
    """

    def action(module: nn.Module) -> tuple[torch.Tensor, ...]:
        for path, watcher in watchers.items():
            _show(module.get_submodule(path), watcher)
        module.eval()
        with seeded(module, seed), torch.no_grad():
            return tuple(tensors(module(*copy.deepcopy(tuple(args)), **copy.deepcopy(dict(kwargs)))))

    return on_copy(program.module, action)


def _show(layer: nn.Module, watcher: Watcher) -> None:
    got: list[tuple[torch.Tensor, ...]] = []

    def before(layer: nn.Module, inputs: Any) -> None:
        got.append(tuple(t.detach().clone() for t in inputs if isinstance(t, torch.Tensor)))

    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        watcher(got.pop(), output)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def light_copy(program: Program) -> Program:
    """A copy with modules and parameters of its own, whose parameters share the memory of the program's."""
    return replace(program, module=copy.deepcopy(program.module, sharing(program.module)))


def perturbed(program: Program, seed: int) -> Program:
    """A light copy in which parameters that are all zero or all one are random: they would hide errors."""
    made = light_copy(program)
    places = Places(made.module)
    generator = torch.Generator().manual_seed(seed)
    for holder in list(made.module.modules()):
        for name, parameter in holder._parameters.items():
            if parameter is not None and _is_uniform(parameter):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
                moved = parameter.detach() + noise.to(parameter)
                places.set(holder._parameters, name, nn.Parameter(moved, parameter.requires_grad))
    return made


def _is_uniform(parameter: torch.Tensor) -> bool:
    """Whether all elements are zero, or all are one."""
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    first = parameter.detach().reshape(-1)[:1]
    return first.item() in (0.0, 1.0) and bool((parameter == first).all())


def fresh_inputs(args: Any, kwargs: Any, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """New inputs in each example's domain: floats by mean and deviation, integers permuted, masks permuted by row."""
    generator = torch.Generator().manual_seed(seed + 1)

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() == 0 or value.is_meta:
            return value
        if value.is_floating_point():
            if value.dim() == 0 or _is_mask(value):
                return value.clone()
            wide = value.double()
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            deviation = wide.std() if value.numel() > 1 else 0.0
            return (wide.mean() + noise * deviation).to(value.dtype)
        if _is_mask(value):
            return _rows_permuted(value, generator)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)

    made: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(fresh, (tuple(args), dict(kwargs)))
    return made


def _is_mask(value: torch.Tensor) -> bool:
    return value.dtype is torch.bool or bool(((value == 0) | (value == 1)).all())


def _rows_permuted(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.dim() == 0:
        return value.clone()
    order = torch.randperm(value.shape[-1], generator=generator).to(value.device)
    return value[..., order]
