"""Program to ONNX model: export, conversion by onnxscript, names of the dynamic axes, weights beside the graph."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from rewrite.errors import RewriteError, first_line
from rewrite.graph.export import Inputs
from rewrite.graph.nodes import fixed_size
from rewrite.lowering.composed import composed
from rewrite.lowering.flat import Flat
from rewrite.lowering.layer_traces import NotComposedError
from rewrite.numerics.sizes import dynamic_axes

from .decompose import Decomposed
from .quickened import quickened

if TYPE_CHECKING:
    from rewrite.graph.program import Dimension, LayerGraph, Program


OPSET = 20
"""The opset written by default: the first where Gelu is one operator. RMSNorm and attention are so from 23 on."""

_NOISE = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : "
    r"|/onnxruntime_src/.* was false\. "
)  # the place in its source

_LONG = 3000
"""So much of an error is read before its noise is taken out."""
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
    text = _NOISE.sub("", first_line(error, _LONG)).strip() or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def export_flat(program: Program, flat: Flat, inputs: Sequence[torch.Tensor], dynamic: bool) -> ExportedProgram:
    """The flat program as torch.export has it, with the program's dynamic dimensions.

    Where these are the free sizes of its graph, it is put together from that; else it is traced.
    """
    free = dynamic_axes(program) if dynamic else [{} for _ in flat.inputs]
    exported = None
    if [{*axes} for axes in free] == _free_axes(flat.module):
        with contextlib.suppress(NotComposedError):
            exported = composed(flat.module, Inputs(flat.module.interface.signature, tuple(inputs), {}))
    exported = exported or _traced(program, flat, inputs, free)
    _settle_strides(exported)
    return exported


def _free_axes(module: LayerGraph) -> list[set[int]]:
    """The axes of each input whose size a graph leaves free."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    return [{axis for axis, size in enumerate(value.shape) if fixed_size(size) is None} for value in values]


def _traced(
    program: Program, flat: Flat, inputs: Sequence[torch.Tensor], free: Sequence[Mapping[int, Dimension]]
) -> ExportedProgram:
    shapes = tuple(dict.fromkeys(axes, Dim.AUTO) for axes in free)
    try:
        with torch.no_grad():
            exported = torch.export.export(flat.module, tuple(inputs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise failure(program, "torch.export stops", error) from error
    for name, value, axes in zip(flat.inputs, _user_inputs(exported), free, strict=True):
        for axis, dimension in axes.items():
            if isinstance(value.meta["val"].shape[axis], int):
                raise RewriteError(
                    f"{program.origin.model_class} cannot keep {name}[{axis}] dynamic in ONNX: its "
                    f"evaluation fixes it at {dimension.size}; dynamic=False exports it with the "
                    "example's sizes"
                )
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
                    made = module.graph.call_function(
                        torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                made.meta = dict(node.meta)
                node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        module.recompile()


def converted(program: Program, flat: Flat, exported: ExportedProgram, opset: int) -> Any:
    """The ONNX model of an export, by torch's exporter. Raises RewriteError where it cannot be converted."""
    try:
        with quickened() as known:
            model = torch.onnx.export(
                Decomposed.of(exported, known),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(flat.inputs),
                output_names=list(flat.outputs),
                dynamic_shapes=_axis_names(flat.inputs, exported),
            )
    except Exception as error:
        raise failure(program, "the conversion stops", error) from error
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
            if fixed_size(size) is not None or str(size) in seen:
                continue
            seen.add(str(size))
            kind = "batch" if axis == 0 else f"axis{axis}"
            if axis == 1 and value.dim() == 2 and not value.is_floating_point():
                kind = "sequence"
            taken = any(kind in named.values() for named in names)
            names[-1][axis] = f"{name}_{kind}" if taken or kind.startswith("axis") else kind
    return tuple(names)


def failure(program: Program, step: str, error: Exception) -> RewriteError:
    """The error of a step that did not work."""
    return RewriteError(
        f"{program.origin.model_class} cannot be exported to ONNX, {step}: {reason(error)}; other lowerings do not need ONNX"
    )


def weights(model: Any) -> int:
    """Bytes of the constants that the file will hold."""
    return sum(v.const_value.nbytes for v in model.model.graph.initializers.values() if v.const_value is not None)
