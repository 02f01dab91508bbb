"""Programs as ``.pt2`` files, and back.

The archive is a regular one of torch.export: its model ``model`` is the program in evaluation mode with outputs in plain
containers, so that ``torch.export.load`` is right for inference and needs neither this package nor the model's library.
Beside it lie the layer graph as JSON and the tensors that ``model`` does not hold, from which ``load`` rebuilds the same
program, to be trained and rewritten further. ``load`` reads nothing through torch.export.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from rewrite.errors import RewriteError, named_line
from rewrite.graph.copies import uncollected
from rewrite.graph.history import Record
from rewrite.graph.interface import Interface
from rewrite.graph.layers import Constants
from rewrite.graph.nodes import fixed_size
from rewrite.graph.program import Dimension, LayerGraph, Opaque, Origin, Program
from rewrite.graph.properties import thawed
from rewrite.rebuild.folder import write_class
from rewrite.sources.installed import Installed
from rewrite.sources.paths import check_regular

from . import checked
from .archive import Archive, Writer
from .evaluation import EXAMPLES, write_evaluation
from .examples import read_examples, write_examples
from .foreign import read_foreign
from .graphs import decode_graph, encode_graph, import_homes, operator_homes, operators_used
from .interfaces import decode_interface, encode_interface
from .modules import Decoder, encode_module
from .revalue import revalue
from .staging import Staging, explained, is_folder_name, of_the_system
from .tensors import TensorWriter, describe, read_tensors, tied

FORMAT = 2
_LAYERS, _TENSORS = "rewrite/program.json", "rewrite/tensor_"


def save(program: Program, path: str | os.PathLike[str]) -> Path:
    """Write a program to a ``.pt2`` file, or to a new folder that its model's own library reads; the path of it.

    A folder (a name without a suffix) is written where the result is the model's class with other sizes: found from the
    shapes, read back by the class and compared with the program before it appears. Otherwise it is ``FOLDER.pt2``, and a
    Python warning tells why. On any failure what was there stays as it was.

    Raises RewriteError for another suffix, a folder that is not empty, a layer that is code which a file cannot hold, or
    a place that cannot be written.
    """
    target = Path(path)
    if is_folder_name(target):
        with Staging() as staging:
            written, _, reason = write_folder(program, target, staging)
        if reason:
            warnings.warn(f"{target} is not written, {written} is: {reason}", stacklevel=2)
        return written
    if target.suffix != ".pt2":
        raise RewriteError(f"a program is saved as .pt2, or as a folder (a name without a suffix), not {target.name}")
    with explained(target), Staging() as staging:
        write_program(program, staging.path(target), target.stem)
    return target


def write_folder(program: Program, path: Path, staging: Staging) -> tuple[Path, str, str]:
    """Stage a program as a folder of its model's library: what was staged, how it is read, and, where that is a ``.pt2``
    because no folder holds it, the reason.
    """
    place = staging.folder(path)
    with explained(path), of_the_system():
        try:
            return path, write_class(program, place, path.name), ""
        except RewriteError as error:
            reason = str(error)
    staging.drop(path)
    instead = path.with_name(f"{path.name}.pt2")
    with explained(instead):
        write_program(program, staging.path(instead), instead.stem)
    return instead, "a program, read it with rewrite.load or torch.export.load", reason


def write_program(program: Program, path: Path, root: str) -> None:
    """Write a program's archive to a file, under the folder ``root`` inside. Raises OSError where the disk refuses it."""
    examples = write_examples(tuple(program.example_args), program.example_kwargs)
    with uncollected(), Writer(path, root) as writer:
        layers = _encoded(program)
        tensors = TensorWriter(writer)
        write_evaluation(program, writer, tensors, examples)
        layers["tensors"] = {
            name: describe(tensor, tensors.find(tensor) or tensors.add(tensor, _TENSORS))
            for name, tensor in named_tensors(program.module).items()
        }
        writer.add(_LAYERS, json.dumps(layers).encode())


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant by its path, each once, under its first path."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for path, part in module.named_modules():
        if isinstance(part, Constants):
            found.update({f"{path}.{name}": part.__dict__[name] for name in part.names})
    return found


def _encoded(program: Program) -> dict[str, Any]:
    shared: dict[int, list[str]] = {}
    for name, tensor in [
        *program.module.named_parameters(remove_duplicate=False),
        *program.module.named_buffers(remove_duplicate=False),
    ]:
        shared.setdefault(id(tensor), []).append(name)
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "graph": encode_graph(program.graph),
        "modules": encode_module(program.module),
        "interface": encode_interface(program.module.interface),
        "operators": operator_homes(program.module, program.graph),
        "tied": [names for names in shared.values() if len(names) > 1],
        "dimensions": [asdict(d) for d in program.dimensions],
        "opaque": [asdict(o) for o in program.opaque],
        "origin": {
            "model_class": program.origin.model_class,
            "seconds": dict(program.origin.seconds),
            "parameter_shapes": {k: list(v) for k, v in program.origin.parameter_shapes.items()},
            "notes": list(program.origin.notes),
        },
        "history": [record.to_json() for record in program.history],
        "properties": thawed(program.properties),
    }


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program from a ``.pt2`` file that ``save`` or ``torch.export.save`` wrote.

    Nothing in it is unpickled, evaluated or imported unseen; a file of this package whose digests do not fit is refused.
    Raises RewriteError for a missing, damaged or foreign file.
    """
    source = Path(path)
    _check_file(source)
    try:
        with source.open("rb") as file:
            return _read(Archive(file))
    except RewriteError as error:
        raise RewriteError(f"{source} cannot be read: {error}") from error
    except OSError as error:
        raise RewriteError(f"cannot read {source}: {error.strerror or error}") from None
    except Exception as error:  # what a file can get wrong is without end; a bug of ours is in the chain
        raise RewriteError(f"{source} cannot be read as a .pt2 archive: {named_line(error)}") from error


def _check_file(source: Path) -> None:
    """Asked before it is opened: a pipe would keep whoever opens it waiting."""
    check_regular(source)
    with source.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise RewriteError(f"{source} is no .pt2 archive: it is empty, damaged or of another kind")


def _read(archive: Archive) -> Program:
    if not archive.is_signed:
        if "extra/rewrite.json" in archive.entries:
            raise RewriteError(f"it has format 1, this version reads {FORMAT}: use the version that wrote it")
        return read_foreign(archive)
    archive.check_signature()
    program = _rebuilt(archive)
    archive.check_rest()
    return program


def _rebuilt(archive: Archive) -> Program:
    data = checked.table(checked.parsed(archive.read(_LAYERS), "program"), "program", "format")
    if data["format"] != FORMAT:
        shown = checked.shown(data["format"])
        raise RewriteError(f"it has format {shown}, this version reads {FORMAT}: use the version that wrote it")
    checked.table(data, "program", "graph", "modules", "interface", "operators", "tied", "tensors", "origin", "history")
    installed = Installed.here()
    import_homes(data["operators"], _used(data), installed)
    tensors = _tied(read_tensors(archive, data["tensors"]), data)
    root = Decoder(tensors, installed).module(data["modules"])
    graph = decode_graph(data["graph"])
    interface = decode_interface(data["interface"], installed)
    if sum(node.op == "placeholder" for node in graph.nodes) != interface.input_count:
        raise RewriteError("its graph has other inputs than its interface")
    module = LayerGraph(root, graph, interface)
    module.assume(checked.table(data.get("properties", {}), "properties"))
    args, kwargs = read_examples(archive.read(EXAMPLES))
    interface.bind(args, kwargs)
    revalue(module, graph)
    _check_inputs(graph, interface)
    return Program(module, args, kwargs, *_notes(data))


def _check_inputs(graph: Graph, interface: Interface) -> None:
    """The graph's inputs have the sizes that a call is checked against."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node, shape in zip(inputs, interface.shapes, strict=True):
        sizes = [fixed_size(size) for size in node.meta["val"].shape]
        if len(sizes) != len(shape) or any(b is not None and a != b for a, b in zip(sizes, shape, strict=True)):
            raise RewriteError(f"the input {node.name} of its graph has other sizes than its interface")


def _used(data: Mapping[str, Any]) -> list[str]:
    """The operators of the graph and of the regions in the modules."""
    found = list(operators_used(data["graph"]))
    modules = [data["modules"]]
    for each in modules:
        module = checked.table(each, "module")
        modules += checked.table(module.get("children", {}), "children").values()
        for graph in checked.table(module.get("graphs", {}), "graphs").values():
            found += operators_used(graph)
    return found


def _tied(tensors: dict[str, torch.Tensor], data: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    for group in checked.items(data["tied"], "tied names"):
        names = [checked.path(name) for name in checked.items(group, "tied names")]
        first = tied(tensors, names)
        grad = _requires_grad(data["modules"], names[0])
        shared = first if grad is None else nn.Parameter(first.detach(), grad)
        tensors.update(dict.fromkeys(names, shared))
    return tensors


def _requires_grad(modules: Any, name: str) -> bool | None:
    """Whether the parameter ``name`` of an encoded module tree requires grad; None for a buffer."""
    *path, last = name.split(".")
    for part in path:
        modules = checked.table(checked.table(modules, "module").get("children"), "children", part)[part]
        if "same" in modules:
            return None
    found = checked.table(modules, "module").get("parameters", {}).get(last)
    return None if found is None else checked.truth(found, "requires_grad")


def _notes(data: Mapping[str, Any]) -> tuple[tuple[Dimension, ...], tuple[Opaque, ...], Origin, tuple[Record, ...]]:
    """What is told of a program and computes nothing."""
    origin = checked.table(data["origin"], "origin", "model_class", "parameter_shapes", "seconds", "notes")
    try:
        return (
            tuple(Dimension(**d) for d in data["dimensions"]),
            tuple(Opaque(**o) for o in data["opaque"]),
            Origin(
                checked.text(origin["model_class"]),
                {k: tuple(checked.size(n) for n in v) for k, v in origin["parameter_shapes"].items()},
                {k: float(v) for k, v in origin["seconds"].items()},
                tuple(checked.text(note) for note in origin["notes"]),
            ),
            tuple(Record.from_json(r) for r in checked.items(data["history"], "history")),
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        raise RewriteError("what it tells of its origin and history is damaged") from None
