"""Inputs and parameters to try a program with: fresh, perturbed, recorded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from rewrite.graph.program import Program
from rewrite.torch_private import pytree


def record_inputs(
    program: Program, paths: set[str], args: Any, kwargs: Any, seed: int
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The tensors that the layers at ``paths`` are called with, in one evaluation run (the last call counts)."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    module = copy.deepcopy(program.module).eval()
    for path in paths:

        def hook(layer: nn.Module, inputs: Any, path: str = path) -> None:
            found[path] = tuple(t.detach().clone() for t in inputs if isinstance(t, torch.Tensor))

        module.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return found


def perturbed(program: Program, seed: int) -> Program:
    """A copy in which parameters that are all zero or all one are random: they would hide errors."""
    made = program.clone()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.module.parameters():
        first = parameter.detach().reshape(-1)[:1]
        if (
            parameter.is_floating_point()
            and parameter.numel()
            and first.item() in (0.0, 1.0)
            and bool((parameter == first).all())
        ):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            with torch.no_grad():
                parameter.copy_(parameter + noise.to(parameter))
    return made


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
