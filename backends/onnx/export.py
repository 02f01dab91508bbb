"""ONNX: the program for inference in one file, or in two where it is too large for one, checked before it appears."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from rewrite.errors import RewriteError
from rewrite.files.staging import Staging, explained
from rewrite.lowering.flat import Flat, dynamic_axes, examples, flattened, other_sizes
from rewrite.numerics.compare import relative_error

from .session import CPU, Session

if TYPE_CHECKING:
    from rewrite.graph.program import Program

OPSET = 20
"""The opset written by default: the first where Gelu is one operator. RMSNorm and attention are so from 23 on."""

TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""The largest difference from eager, relative to the largest value of an output, by the narrowest dtype computed in.

Measured in float32: 1e-7 to 2e-6 over the development models, before and after ``dyt``. ONNX keeps some constants in
float32 whatever the model's dtype is, hence the 1e-6 for float64.
"""

_NOISE = re.compile(r"\x1b\[[0-9;]*m"  # colours
                    r"|\[ONNXRuntimeError\] : \d+ : \w+ : "
                    r"|/onnxruntime_src/.* was false\. ")  # the place in its source
_FIRST_OPSET = 18  # of torch's exporter
_MOST_IN_ONE_FILE = 2**31 - 2**26  # protobuf ends at 2 GiB; the graph needs some of it
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Written:
    """A program written as ``file``, not yet run: what it should compute, on which inputs, and how exactly."""

    file: Path
    flat: Flat
    inputs: list[torch.Tensor]
    opset: int
    dynamic: bool
    tolerance: float


def export(program: Program, path: str | Path, *, opset: int | None = None, external_data: bool | None = None,
           dynamic: bool = True, check_values: bool = True) -> Path:
    """Write a program as an ONNX file and return its path; dynamic dimensions stay dynamic, outputs are named.

    ``opset`` (18 or more) defaults to ``OPSET``. ``external_data`` puts the weights into ``<name>.data`` beside the
    file; by default only where one file cannot hold them. ``dynamic=False`` fixes every size at the example's.

    The file is written under another name, checked by ONNX's checker, and run in ONNX Runtime on the CPU against eager:
    on the example inputs, with other sizes and with a batch of one, to the ``TOLERANCES``; then it is renamed.
    ``check_values=False`` skips the run. Raises RewriteError, and leaves nothing behind, where any of this fails.
    """
    path = Path(path)
    with explained(path), Staging() as staging:
        file = staging.path(path)
        written = write(program, file, opset=opset, external_data=external_data, dynamic=dynamic)
        if check_values:
            check(program, written, _on_cpu(program, file))
    return path


def write(program: Program, file: Path, *, opset: int | None = None, external_data: bool | None = None,
          dynamic: bool = True) -> Written:
    """Write a program as an ONNX file that ONNX's checker accepts; it is not run."""
    need("onnx", "onnxscript")
    if opset is not None and opset < _FIRST_OPSET:
        raise RewriteError(f"ONNX opset {opset} cannot be written: the exporter starts at {_FIRST_OPSET}; leave it out "
                           f"for {OPSET}")
    if any(t.is_meta for t in [*program.module.parameters(), *program.module.buffers()]):
        raise RewriteError("a model on the meta device has no weights to export: move it to a real one")
    flat, inputs = flattened(program), examples(program)
    with quiet():
        exported = _exported(program, flat, inputs, dynamic)
        model = _converted(program, flat, exported, opset or OPSET)
        large = _weights(model) > _MOST_IN_ONE_FILE
        model.save(file, external_data=large if external_data is None else external_data)
    _check_format(program, file)
    return Written(file, flat, inputs, opset or OPSET, dynamic, _tolerance(exported))


def need(*packages: str) -> None:
    """Raise RewriteError with the line to run where a package is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RewriteError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user: what matters is raised."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def reason(error: BaseException) -> str:
    """The first line of what an error goes back to, without noise, at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = _NOISE.sub("", str(error)).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


# -------------------- conversion --------------------


def _exported(program: Program, flat: Flat, inputs: Sequence[torch.Tensor], dynamic: bool) -> ExportedProgram:
    """The flat program as torch.export has it, with the program's dynamic dimensions."""
    free = dynamic_axes(program) if dynamic else [{} for _ in flat.inputs]
    shapes = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in free)
    try:
        with torch.no_grad():
            exported = torch.export.export(flat.module, tuple(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _failure(program, "torch.export stops", error) from error
    for name, value, axes in zip(flat.inputs, _user_inputs(exported), free, strict=True):
        for axis, dimension in axes.items():
            if isinstance(value.meta["val"].shape[axis], int):
                raise RewriteError(f"{program.origin.model_class} cannot keep {name}[{axis}] dynamic in ONNX: its "
                                   f"evaluation fixes it at {dimension.size}; dynamic=False exports it with the "
                                   "example's sizes")
    _settle_strides(exported)
    return exported


def _user_inputs(exported: ExportedProgram) -> list[torch.fx.Node]:
    names = exported.graph_signature.user_inputs
    return [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]


def _settle_strides(exported: ExportedProgram) -> None:
    """Make attention's result contiguous.

    Its strides depend on the kernel that is chosen, and the conversion traces twice: what was a view of the first
    trace's strides may be none of the second's (T5).
    """
    for module in exported.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.target is torch.ops.aten.scaled_dot_product_attention.default:
                with module.graph.inserting_after(node):
                    made = module.graph.call_function(torch.ops.aten.clone.default, (node,),
                                                      {"memory_format": torch.contiguous_format})
                made.meta = dict(node.meta)
                node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        module.recompile()


def _converted(program: Program, flat: Flat, exported: ExportedProgram, opset: int) -> Any:
    try:
        model = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=opset,
                                  input_names=list(flat.inputs), output_names=list(flat.outputs),
                                  dynamic_shapes=_axis_names(flat.inputs, exported))
    except Exception as error:
        raise _failure(program, "the conversion stops", error) from error
    assert model is not None
    written = model.model.opset_imports.get("")
    if written != opset:
        raise RewriteError(f"{program.origin.model_class} cannot be written in ONNX opset {opset}: it needs {written}")
    for node in model.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names files of this machine
    return model


def _axis_names(inputs: Sequence[str], exported: ExportedProgram) -> tuple[dict[int, str], ...]:
    """Names for the symbols of input sizes, each where it first stands: ``batch``, ``sequence``, ``x_axis2``."""
    names: list[dict[int, str]] = []
    seen: set[str] = set()
    for name, node in zip(inputs, _user_inputs(exported), strict=True):
        names.append({})
        value = node.meta["val"]
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) or str(size) in seen:
                continue
            seen.add(str(size))
            kind = "batch" if axis == 0 else f"axis{axis}"
            if axis == 1 and value.dim() == 2 and not value.is_floating_point():
                kind = "sequence"
            taken = any(kind in named.values() for named in names)
            names[-1][axis] = f"{name}_{kind}" if taken or kind.startswith("axis") else kind
    return tuple(names)


def _failure(program: Program, step: str, error: Exception) -> RewriteError:
    return RewriteError(f"{program.origin.model_class} cannot be exported to ONNX, {step}: {reason(error)}; "
                        "other lowerings do not need ONNX")


def _weights(model: Any) -> int:
    """Bytes of the constants that the file will hold."""
    return sum(v.const_value.nbytes for v in model.model.graph.initializers.values() if v.const_value is not None)


# -------------------- checks --------------------


def _tolerance(exported: ExportedProgram) -> float:
    """The tolerance of the narrowest floating dtype that the program computes in, autocast regions included."""
    found = {TOLERANCES[torch.float32]}
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            values = (node.meta.get("val") for node in module.graph.nodes)
            found |= {TOLERANCES[v.dtype] for v in values if isinstance(v, torch.Tensor) and v.dtype in TOLERANCES}
    return max(found)


def _check_format(program: Program, file: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except Exception as error:
        raise _failure(program, "the result is not valid ONNX", error) from error


def _on_cpu(program: Program, file: Path) -> Session:
    need("onnxruntime")
    try:
        return Session(file, [CPU])
    except Exception as error:
        raise RewriteError(f"{program.origin.model_class} in ONNX cannot be checked, ONNX Runtime's CPU does not run "
                           f"it: {reason(error)}; check_values=False writes it without a run") from error


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
                raise RewriteError(f"{program.origin.model_class} in ONNX fails with {what}: {reason(error)}; "
                                   f"{way_out}") from error
            for name, ours, theirs in zip(written.flat.outputs, wanted, got, strict=True):
                _compare(program, f"{name} with {what}", torch.as_tensor(ours), theirs, written.tolerance)
            break


def _compare(program: Program, what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise RewriteError(f"{program.origin.model_class} in ONNX gives {what} as {theirs.dtype} {list(theirs.shape)} "
                           f"where eager gives {ours.dtype} {list(ours.shape)}")
    error = relative_error(ours, theirs)
    if not error <= tolerance:
        raise RewriteError(f"{program.origin.model_class} in ONNX differs from eager: {what} is off by {error:.1e} of "
                           f"its largest value, allowed {tolerance:.0e}; is the model random in evaluation?")
