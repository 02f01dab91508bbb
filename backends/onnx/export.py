"""ONNX: the program for inference in one file, or in two where it is too large for one, checked before it appears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewrite.errors import RewriteError
from rewrite.files.staging import Staging, explained
from rewrite.graph.export import without_lines
from rewrite.lowering.flat import examples, flattened

from .check import check, check_format, on_cpu, tolerance
from .convert import OPSET, Written, converted, export_flat, need, quiet, weights

if TYPE_CHECKING:
    from rewrite.graph.program import Program


_FIRST_OPSET = 18  # of torch's exporter
_MOST_IN_ONE_FILE = 2**31 - 2**26  # protobuf ends at 2 GiB; the graph needs some of it


def export(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    external_data: bool | None = None,
    dynamic: bool = True,
    check_values: bool = True,
) -> Path:
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
            check(program, written, on_cpu(program, file))
    return path


def write(
    program: Program, file: Path, *, opset: int | None = None, external_data: bool | None = None, dynamic: bool = True
) -> Written:
    """Write a program as an ONNX file that ONNX's checker accepts; it is not run."""
    need("onnx", "onnxscript")
    if opset is not None and opset < _FIRST_OPSET:
        raise RewriteError(
            f"ONNX opset {opset} cannot be written: the exporter starts at {_FIRST_OPSET}; leave it out for {OPSET}"
        )
    if any(t.is_meta for t in [*program.module.parameters(), *program.module.buffers()]):
        raise RewriteError("a model on the meta device has no weights to export: move it to a real one")
    flat, inputs = flattened(program), examples(program)
    with quiet(), without_lines():  # they would name files of this machine
        exported = export_flat(program, flat, inputs, dynamic)
        model = converted(program, flat, exported, opset or OPSET)
        large = weights(model) > _MOST_IN_ONE_FILE
        model.save(file, external_data=large if external_data is None else external_data)
    check_format(program, file)
    return Written(file, flat, inputs, opset or OPSET, dynamic, tolerance(exported))
