"""A compiler for model surgery on PyTorch models.

    model = rewrite.transform(model, "dyt", args=(x,))    # the whole way, or step by step:

    program = rewrite.capture(model, (x,))
    program = rewrite.apply(program, "dyt{alpha=0.8}")
    model = rewrite.graft(program, model)

Importing this package imports neither torch nor the rest of it: each public name is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewrite.analysis.influence import depth
    from rewrite.files.store import load, save
    from rewrite.frontend.capture import capture
    from rewrite.graph.program import Program
    from rewrite.healing.healed import heal
    from rewrite.lowering.graft import graft
    from rewrite.lowering.lower import export_onnx, lower
    from rewrite.numerics.compare import verify
    from rewrite.pipeline.crash import VerificationError
    from rewrite.pipeline.pass_ import Pass, option
    from rewrite.pipeline.registry import get_pass, pass_names
    from rewrite.pipeline.run import apply
    from rewrite.pipeline.select import Selector
    from rewrite.proof.between import prove
    from rewrite.proof.contract import CLOSE, ESTIMATE, NEW, SAME, Contract
    from rewrite.training.carried import expand_state
    from rewrite.training.saved import memory

    from .errors import RewriteError
    from .surgery import transform

__version__ = "0.1.0"

__all__ = [
    "CLOSE",
    "ESTIMATE",
    "NEW",
    "SAME",
    "Contract",
    "Pass",
    "Program",
    "RewriteError",
    "Selector",
    "VerificationError",
    "apply",
    "capture",
    "depth",
    "expand_state",
    "export_onnx",
    "get_pass",
    "graft",
    "heal",
    "load",
    "lower",
    "memory",
    "option",
    "pass_names",
    "prove",
    "save",
    "transform",
    "verify",
]

_HOMES = {
    "analysis.influence": ["depth"],
    "errors": ["RewriteError"],
    "files.store": ["load", "save"],
    "frontend.capture": ["capture"],
    "graph.program": ["Program"],
    "healing.healed": ["heal"],
    "lowering.graft": ["graft"],
    "lowering.lower": ["export_onnx", "lower"],
    "numerics.compare": ["verify"],
    "pipeline.crash": ["VerificationError"],
    "pipeline.pass_": ["Pass", "option"],
    "pipeline.registry": ["get_pass", "pass_names"],
    "pipeline.run": ["apply"],
    "pipeline.select": ["Selector"],
    "proof.between": ["prove"],
    "proof.contract": ["CLOSE", "ESTIMATE", "NEW", "SAME", "Contract"],
    "surgery": ["transform"],
    "training.carried": ["expand_state"],
    "training.saved": ["memory"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
