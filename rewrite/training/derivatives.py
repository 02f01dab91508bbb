"""The step functions that stand for the derivatives of activations: exact, the best ones, or those of Approx-BP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite.graph.like import like
from rewrite.graph.spelled import SpelledActivation
from rewrite.graph.straight import Straight

from .steps import Density, Steps, best_steps

Method = Literal["few-bit", "approx-bp"]
_SPELLED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
}
APPROX_BP: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gelu": ((-0.04922, 1.09796, -0.04874), (-3.18588, -0.00118, 3.19083)),
    "silu": ((-0.04060, 1.08093, -0.04032), (-6.30505, -0.00087, 6.32583)),
}
"""ReGELU2 and ReSiLU2, dx = dy Σ a_i [x > c_i]: the a and the c, of Yang et al. (arXiv 2406.16282)."""


def is_activation(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is an activation of these classes, or one that is spelled out and known."""
    spelled = isinstance(layer, SpelledActivation) and layer.function in _SPELLED
    return spelled or type(layer) in kinds


def function(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation in whatever dtype it is called: what a library spells out casts as it likes."""
    return _SPELLED[layer.function] if isinstance(layer, SpelledActivation) else straight(layer)


def straight(layer: nn.Module) -> nn.Module:
    """The activation as a layer of its own, that writes nothing."""
    if isinstance(layer, SpelledActivation):
        return Straight.of(layer.graphs["any"])
    return like(layer, type(layer), inplace=False) if hasattr(layer, "inplace") else copy.deepcopy(layer)


def steps_for(layer: nn.Module, bits: int, method: Method, density: Density | None = None) -> Steps | None:
    """The step function for an activation's derivative: exact in 1 bit where it is piecewise linear, else the best one for
    the ``density`` of what it is given.

    None where ``method`` is approx-bp and knows none.
    """
    exact = exact_steps(layer)
    if exact is not None:
        return exact
    if method == "few-bit":
        return best_steps(function(layer), bits, density)
    found = APPROX_BP.get(_family(layer))
    if found is None:
        return None
    rises, borders = found
    levels = torch.tensor((0.0, *rises), dtype=torch.float64).cumsum(0)
    return Steps(borders, tuple(levels.tolist()))


def exact_steps(layer: Any) -> Steps | None:
    """The derivative of a piecewise linear activation; None for any other."""
    if isinstance(layer, nn.ReLU):
        return Steps((0.0,), (0.0, 1.0))
    if isinstance(layer, nn.LeakyReLU):
        return Steps((0.0,), (float(layer.negative_slope), 1.0))
    if isinstance(layer, nn.Hardtanh):
        return Steps((float(layer.min_val),), (0.0, 1.0), (float(layer.max_val),))
    return None


def _family(layer: nn.Module) -> str:
    if isinstance(layer, SpelledActivation):
        return layer.function.removesuffix("_tanh")
    return type(layer).__name__.lower()
