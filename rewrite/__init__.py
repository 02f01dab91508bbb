"""A compiler for model surgery on PyTorch models.

    program = rewrite.capture(model, (x,))
    program = rewrite.apply(program, "dyt{alpha=0.8}")
    model = rewrite.graft(program, model)

Importing this package imports neither torch nor the rest of it: each public name is loaded at its first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .capture import capture
    from .contract import Contract
    from .errors import RewriteError
    from .graft import graft
    from .lower import export_onnx, lower
    from .pass_ import Pass
    from .pipeline import apply
    from .program import Program
    from .registry import get_pass, pass_names
    from .select import Selector
    from .store import load, save
    from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "Contract",
    "Pass",
    "Program",
    "RewriteError",
    "Selector",
    "apply",
    "capture",
    "export_onnx",
    "get_pass",
    "graft",
    "load",
    "lower",
    "pass_names",
    "save",
    "verify",
]

_HOME = {
    "Contract": "contract",
    "Pass": "pass_",
    "Program": "program",
    "RewriteError": "errors",
    "Selector": "select",
    "apply": "pipeline",
    "capture": "capture",
    "export_onnx": "lower",
    "get_pass": "registry",
    "graft": "graft",
    "load": "store",
    "lower": "lower",
    "pass_names": "registry",
    "save": "store",
    "verify": "verify",
}


class _Package(ModuleType):
    """Loads public names at their first use, and keeps them.

    Importing a submodule sets it as an attribute of its package. For `rewrite.capture` and others named after
    their one function, the attribute stays the function; `from rewrite.capture import ...` and `sys.modules`
    reach the module all the same.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
