"""ONNX Runtime: the program exported to ONNX and run by it, on CUDA where both sides have it."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rewrite.backends.onnx.check import check
from rewrite.backends.onnx.convert import need, reason
from rewrite.backends.onnx.export import write
from rewrite.backends.onnx.session import CPU, CUDA, Session
from rewrite.errors import RewriteError
from rewrite.lowering.flat import flat_outputs

if TYPE_CHECKING:
    from rewrite.graph.program import Program

_SHORT = {"cpu": CPU, "cuda": CUDA}


class OnnxInference:
    """A lowered program: called with the model's signature; ``session`` computes, ``providers`` says on what."""

    def __init__(self, program: Program, session: Session) -> None:
        self.session = session
        self.interface = program.module.interface
        self.leaves = flat_outputs(program.module)[1]
        self.__signature__ = self.interface.signature

    @property
    def providers(self) -> list[str]:
        """ONNX Runtime's execution providers in use, the preferred one first."""
        return list(self.session.providers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self.session(self.interface.bind(args, kwargs))
        return self.interface.leave([leaf.of(tensors) for leaf in self.leaves], training=False)


def lower(program: Program, *, providers: Sequence[str] | None = None, opset: int | None = None) -> OnnxInference:
    """Export the program to ONNX, open it in ONNX Runtime and check it there, as ``rewrite.backends.onnx`` does.

    ``providers`` are execution providers in order of preference, by their names or as ``"cuda"`` and ``"cpu"``. By
    default CUDA is used where PyTorch has a CUDA device, and the CPU, with a warning, where it cannot be started.
    ``opset`` is that of the export.

    Raises RewriteError where the export fails, its results differ, or a provider that was asked for cannot be used.
    """
    need("onnxruntime")
    wanted = _providers(providers)
    with tempfile.TemporaryDirectory(prefix="rewrite-", ignore_cleanup_errors=True) as folder:
        written = write(program, Path(folder) / "model.onnx", opset=opset)
        session = _opened(written.file, wanted, asked=providers is not None)
        check(program, written, session)
    return OnnxInference(program, session)


def _providers(asked: Sequence[str] | None) -> list[str]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if asked is None:
        return [CUDA, CPU] if _has_cuda() and CUDA in available else [CPU]
    names = [_SHORT.get(name, name) for name in ([asked] if isinstance(asked, str) else asked)]
    for name in names:
        if name not in available:
            raise RewriteError(
                f"this ONNX Runtime has no {name}; it has {', '.join(available)}"
                + "; CUDA is in the package onnxruntime-gpu" * (name == CUDA)
            )
    if CUDA in names and not _has_cuda():
        raise RewriteError("PyTorch sees no CUDA device, so ONNX Runtime cannot be given one: leave providers out")
    return names


def _has_cuda() -> bool:
    return torch.cuda.is_available()


def _opened(file: Path, providers: list[str], asked: bool) -> Session:
    import onnxruntime

    if CUDA in providers and hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(None):
            onnxruntime.preload_dlls()  # finds the CUDA libraries that came with PyTorch
    try:
        session = Session(file, providers)
    except Exception as error:
        raise RewriteError(
            f"ONNX Runtime cannot run the program on {', '.join(providers)}: {reason(error)}; other lowerings do not need it"
        ) from error
    missing = [name for name in providers if name not in session.providers]
    if missing:
        line = (
            f"ONNX Runtime cannot start {', '.join(missing)}: are the libraries it was built for installed, "
            f"CUDA {getattr(onnxruntime, 'cuda_version', '')} and cuDNN?"
        )
        if asked:
            raise RewriteError(line)
        warnings.warn(f"{line} It runs on the CPU.", stacklevel=3)
    return session
