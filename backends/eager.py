"""Eager PyTorch: the layer graph as it is, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rewrite.lowering.inference import evaluated

if TYPE_CHECKING:
    from rewrite.graph.program import LayerGraph, Program


class Inference:
    """A lowered program: called with the model's signature, in evaluation mode, without gradient.

    ``module`` is the program's own copy, so later changes of the program or the model do not reach it.
    """

    def __init__(self, module: LayerGraph, run: Callable[..., Any] | None = None) -> None:
        self.module = module
        self.run = module if run is None else run
        self.__signature__ = module.interface.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.run(*args, **kwargs)


def lower(program: Program) -> Inference:
    """A callable over a copy of the program in evaluation mode, bit-identical to ``program.module.eval()``."""
    return Inference(evaluated(program))
