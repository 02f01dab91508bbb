"""TorchInductor: the layer graph as one graph through ``torch.compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rewrite.lowering.inference import evaluated

from .eager import Inference

if TYPE_CHECKING:
    from rewrite.graph.program import Program


def lower(program: Program, *, dynamic: bool | None = None, mode: str | None = None) -> Inference:
    """A callable that compiles a copy of the program at its first call, whole: a graph break is an error.

    ``dynamic`` None compiles once for all sizes if the program has dynamic dimensions (a size of 1 compiles once
    more); its static dimensions stay constants, since the program's own checks compare them with the captured sizes.
    ``dynamic=False`` compiles anew, and faster code, for each size it meets. ``mode`` is that of ``torch.compile``.
    """
    module = evaluated(program)
    if dynamic is None:
        dynamic = any(d.dynamic for d in program.dimensions)
    return Inference(module, torch.compile(module, fullgraph=True, dynamic=dynamic, mode=mode))
