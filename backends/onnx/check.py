"""An ONNX model is held against eager PyTorch before it appears under its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram

from rewrite.errors import RewriteError
from rewrite.lowering.flat import other_sizes
from rewrite.numerics.compare import relative_error

from .session import CPU, Session

if TYPE_CHECKING:
    from rewrite.graph.program import Program
from .convert import OPSET, Written, failure, need, reason

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The largest difference from eager, relative to the largest value of an output, by the narrowest dtype computed in.

Measured in float32: 1e-7 to 2e-6 over the development models, before and after ``dyt``. ONNX keeps some constants in
float32 whatever the model's dtype is, hence the 1e-6 for float64.
"""


def tolerance(exported: ExportedProgram) -> float:
    """The tolerance of the narrowest floating dtype that the program computes in, autocast regions included."""
    found = {TOLERANCES[torch.float32]}
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            values = (node.meta.get("val") for node in module.graph.nodes)
            found |= {TOLERANCES[v.dtype] for v in values if isinstance(v, torch.Tensor) and v.dtype in TOLERANCES}
    return max(found)


def check_format(program: Program, file: Path) -> None:
    """Hold a file against the standard. Raises RewriteError where it is not valid ONNX."""
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except Exception as error:
        raise failure(program, "the result is not valid ONNX", error) from error


def on_cpu(program: Program, file: Path) -> Session:
    """ONNX Runtime's session of a file on the CPU. Raises RewriteError where it does not run there."""
    need("onnxruntime")
    try:
        return Session(file, [CPU])
    except Exception as error:
        raise RewriteError(
            f"{program.origin.model_class} in ONNX cannot be checked, ONNX Runtime's CPU does not run "
            f"it: {reason(error)}; check_values=False writes it without a run"
        ) from error


def check(program: Program, written: Written, session: Session) -> None:
    """Compare a session with eager on the example inputs, with other sizes and with a batch of one.

    Sizes that the program itself cannot run are passed over. Raises RewriteError where a result differs.
    """
    trials = other_sizes(program) if written.dynamic else ()
    for what, candidates in [("the example inputs", [written.inputs]), *trials]:
        for inputs in candidates:
            try:
                with torch.no_grad():
                    wanted = written.flat.module(*inputs)
            except (RuntimeError, ValueError, IndexError):
                if inputs is written.inputs:
                    raise
                continue
            try:
                got = session(inputs)
            except Exception as error:
                way_out = f"opset {OPSET} may do" if written.opset > OPSET else "other lowerings do not need ONNX"
                raise RewriteError(
                    f"{program.origin.model_class} in ONNX fails with {what}: {reason(error)}; {way_out}"
                ) from error
            for name, ours, theirs in zip(written.flat.outputs, wanted, got, strict=True):
                _compare(program, f"{name} with {what}", torch.as_tensor(ours), theirs, written.tolerance)
            break


def _compare(program: Program, what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise RewriteError(
            f"{program.origin.model_class} in ONNX gives {what} as {theirs.dtype} {list(theirs.shape)} "
            f"where eager gives {ours.dtype} {list(ours.shape)}"
        )
    error = relative_error(ours, theirs)
    if not error <= tolerance:
        raise RewriteError(
            f"{program.origin.model_class} in ONNX differs from eager: {what} is off by {error:.1e} of "
            f"its largest value, allowed {tolerance:.0e}; is the model random in evaluation?"
        )
