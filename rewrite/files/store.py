"""Programs as ``.pt2`` files, and back.

The archive is a regular one of torch.export: its model ``model`` is the program in evaluation mode with outputs in plain
containers, so that ``torch.export.load`` is right for inference and needs neither this package nor the model's library.
Beside it lie the layer graph as JSON, the tensors that ``model`` does not hold, example inputs and history, from which
``load`` rebuilds the same program, to be trained and rewritten further.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram

from rewrite.errors import RewriteError, named_line
from rewrite.frontend.exported import from_exported
from rewrite.graph.codegen import keyword_safe
from rewrite.graph.export import Inputs, export_program, widened
from rewrite.graph.history import Record
from rewrite.graph.layers import Constants
from rewrite.graph.program import Dimension, LayerGraph, Opaque, Origin, Program
from rewrite.graph.regions import Region
from rewrite.sources.installed import is_installed
from rewrite.torch_private import archive, torch_c

from .graphs import decode_graph, encode_graph, import_homes, operator_homes
from .interfaces import decode_interface, encode_interface, plain_spec
from .modules import decode_module, encode_module
from .revalue import revalue
from .staging import Staging, explained

_FORMAT = 1
_LAYERS, _TENSORS, _EXAMPLES = "rewrite.json", "rewrite.safetensors.hex", "rewrite.examples.hex"


def save(program: Program, path: str | os.PathLike[str]) -> Path:
    """Write a program to a ``.pt2`` file, atomically: on any failure a file that was there stays as it was.

    Raises RewriteError if the name does not end in ``.pt2``, a layer is code that a file cannot hold, or the folder
    cannot be written.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise RewriteError(f"a program is saved as .pt2, not {target.name}")
    layers = _encoded(program)
    exported = _exported(program)
    held = dict(exported.state_dict)
    extra = {n: t.contiguous().clone() for n, t in named_tensors(program.module).items() if n not in held}
    files = {_LAYERS: json.dumps(layers), _TENSORS: safetensors.torch.save(extra).hex(), _EXAMPLES: _examples(program).hex()}
    with explained(target), Staging() as staging, keyword_safe():
        archive.package_pt2(str(staging.path(target)), exported_programs={"model": exported}, extra_files=files)
    return target


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant by its path, each once, under its first path."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, part in module.named_modules():
        if isinstance(part, Constants):
            found.update({f"{path}.{name}": part.__dict__[name] for name in part.names})
    return found


def _encoded(program: Program) -> dict[str, Any]:
    tied: dict[int, list[str]] = {}
    for name, tensor in [
        *program.module.named_parameters(remove_duplicate=False),
        *program.module.named_buffers(remove_duplicate=False),
    ]:
        tied.setdefault(id(tensor), []).append(name)
    return {
        "format": _FORMAT,
        "torch": torch.__version__,
        "graph": encode_graph(program.graph),
        "modules": encode_module(program.module),
        "interface": encode_interface(program.module.interface),
        "operators": operator_homes(program.module, program.graph),
        "tied": [names for names in tied.values() if len(names) > 1],
        "dimensions": [asdict(d) for d in program.dimensions],
        "opaque": [asdict(o) for o in program.opaque],
        "origin": {
            "model_class": program.origin.model_class,
            "seconds": dict(program.origin.seconds),
            "parameter_shapes": {k: list(v) for k, v in program.origin.parameter_shapes.items()},
            "notes": list(program.origin.notes),
        },
        "history": [record.to_json() for record in program.history],
    }


def _exported(program: Program) -> ExportedProgram:
    """The program in evaluation mode, outputs in plain containers, exported once more."""
    module = program.clone(share=True).module.eval()
    spec = plain_spec(module.interface.output_specs[1])
    module.__dict__["interface"] = replace(module.interface, output_specs=(spec, spec))
    module.recompile()
    for region in module.modules():
        if isinstance(region, Region):  # inference takes no gradients; torch.export cannot write such blocks
            region.contexts = tuple(c for c in region.contexts if c[0] != "grad")
    signature = module.interface.signature
    return export_program(module, widened(Inputs(signature, tuple(program.example_args), program.example_kwargs)))


def _examples(program: Program) -> bytes:
    buffer = io.BytesIO()
    torch.save((tuple(program.example_args), dict(program.example_kwargs)), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        raise RewriteError("the example inputs hold objects that a file cannot: capture with plain containers") from None
    return buffer.getvalue()


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program from a ``.pt2`` file that ``save`` or ``torch.export.save`` wrote. Nothing in it is unpickled.

    Raises RewriteError for a missing, damaged or foreign file.
    """
    source = Path(path)
    if not source.is_file():
        raise RewriteError(f"no such file: {source}" if not source.exists() else f"{source} is a folder, not a .pt2 file")
    if not zipfile.is_zipfile(source):
        raise RewriteError(f"{source} is no .pt2 archive: it is empty, damaged or of another kind")
    try:
        with _nothing_unpickled():
            files = _extra_files(source)
            if _LAYERS in files:
                return _rebuilt(files, _weights(source))
            return from_exported(torch.export.load(str(source)))
    except RewriteError as error:
        raise RewriteError(f"{source} cannot be read: {error}") from error
    except Exception as error:
        raise RewriteError(f"{source} cannot be read as a .pt2 archive: {named_line(error)}") from error


@contextlib.contextmanager
def _nothing_unpickled() -> Iterator[None]:
    """torch.export falls back to full unpickling where its safe reading fails; here it must not."""
    safe = torch.load

    def load_safely(*args: Any, **kwargs: Any) -> Any:
        return safe(*args, **{**kwargs, "weights_only": True})

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RewriteError("it holds a pickled object, which could run code")

    with (
        mock.patch.object(torch, "load", load_safely),
        mock.patch.object(pickle, "loads", refuse),
        mock.patch.object(torch_c, "_pickle_load_obj", refuse),
    ):
        yield


def _extra_files(source: Path) -> Mapping[str, Any]:
    with archive.PT2ArchiveReader(str(source)) as reader:
        found: Mapping[str, Any] = archive._load_extra_files(reader, reader.get_file_names())
    return found


def _weights(source: Path) -> dict[str, torch.Tensor]:
    with archive.PT2ArchiveReader(str(source)) as reader:
        found: Any = archive._load_state_dict(reader, "model")
    return dict(found)


def _text(content: Any) -> str:
    return content.decode() if isinstance(content, bytes) else str(content)


def _rebuilt(files: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Program:
    data = json.loads(_text(files[_LAYERS]))
    if data["format"] != _FORMAT:
        raise RewriteError(f"it has format {data['format']}, this version reads {_FORMAT}: use the version that wrote it")
    import_homes(data["operators"])
    tensors = {**weights, **safetensors.torch.load(bytes.fromhex(_text(files[_TENSORS])))}
    for names in data["tied"]:
        first = next(tensors[n] for n in names if n in tensors)
        grad = _requires_grad(data["modules"], names[0])
        shared = first if grad is None else nn.Parameter(first.detach(), grad)
        tensors.update(dict.fromkeys(names, shared))
    root = decode_module(data["modules"], tensors)
    graph = decode_graph(data["graph"])
    module = LayerGraph(root, graph, decode_interface(data["interface"], is_installed))
    args, kwargs = torch.load(io.BytesIO(bytes.fromhex(_text(files[_EXAMPLES]))), weights_only=True)
    revalue(module, graph)
    origin = data["origin"]
    return Program(
        module,
        args,
        kwargs,
        tuple(Dimension(**d) for d in data["dimensions"]),
        tuple(Opaque(**o) for o in data["opaque"]),
        Origin(
            origin["model_class"],
            {k: tuple(v) for k, v in origin["parameter_shapes"].items()},
            origin["seconds"],
            tuple(origin["notes"]),
        ),
        tuple(Record.from_json(r) for r in data["history"]),
    )


def _requires_grad(modules: Any, name: str) -> bool | None:
    """Whether the parameter ``name`` of an encoded module tree requires grad; None for a buffer."""
    *path, last = name.split(".")
    for part in path:
        modules = modules["children"][part]
        if "same" in modules:
            return None
    found: bool | None = modules["parameters"].get(last)
    return found
