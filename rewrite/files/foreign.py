"""Archives that torch.export.save wrote: scanned whole, then rebuilt from their parts without torch.export.load.

torch.export.load evaluates size expressions, unpickles, and loads compiled libraries. Here the archive is read by
``Archive``, tensors as bytes, example inputs as data; torch's deserializer is given the graph alone, once ``vetted`` has
judged every text in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.frontend.exported import from_exported
from rewrite.graph.export import quiet
from rewrite.graph.program import Program
from rewrite.sources.installed import Installed
from rewrite.torch_private import schema, serialize

from . import checked
from .archive import Archive
from .checked import DIMENSIONS, Json, items, shown, size, table
from .examples import read_examples
from .tensors import buffer_of
from .values import device
from .vetted import vetted

_KNOWN = ("models/", "data/weights/", "data/constants/", "data/sample_inputs/", "extra/", ".data/", "byteorder", "archive_")


def read_foreign(archive: Archive) -> Program:
    """The program in an archive of torch.export.save. Raises RewriteError where anything in it is not vetted."""
    name = _check_entries(archive)
    document = vetted(checked.parsed(archive.read(f"models/{name}.json"), "graph"), Installed.here())
    weights = _payloads(archive, f"data/weights/{name}_weights_config.json", "data/weights/")
    constants = _payloads(archive, f"data/constants/{name}_constants_config.json", "data/constants/")
    examples = archive.read(f"data/sample_inputs/{name}.pt")
    if not examples:
        raise RewriteError("it holds no example inputs: export it again with torch.export.save")
    call = read_examples(examples)
    with quiet():
        program = serialize._dict_to_dataclass(schema.ExportedProgram, document)
        exported = serialize.ExportedProgramDeserializer().deserialize(program, weights, constants, call)
        return from_exported(exported)


def _check_entries(archive: Archive) -> str:
    """The name of the one model in an archive that holds nothing else than graph, tensors and texts."""
    for entry in archive.entries:
        if entry.startswith("data/aotinductor/"):
            raise RewriteError("it holds a compiled library, which would be loaded: export the model without compiling it")
        if not entry.startswith(_KNOWN):
            raise RewriteError(f"it holds {shown(entry)}, which no export has")
    models = [entry for entry in archive.entries if entry.startswith("models/")]
    if "archive_format" not in archive.entries or archive.read("archive_format", 100) != b"pt2" or not models:
        raise RewriteError("it is no archive of torch.export")
    if len(models) != 1:
        raise RewriteError(f"it holds {len(models)} models: save one in a file")
    return checked.part(models[0].removeprefix("models/").removesuffix(".json"), "model")


def _payloads(archive: Archive, config: str, folder: str) -> dict[str, torch.Tensor]:
    """The tensors of a table of payloads: views of the bytes in the archive, each read once."""
    found = table(checked.parsed(archive.read(config), "table of tensors"), "table of tensors", "config")
    read: dict[Any, torch.Tensor] = {}
    return {
        checked.path(name, "tensor"): _payload(archive, folder, given, read)
        for name, given in table(found["config"], "table of tensors").items()
    }


def _payload(archive: Archive, folder: str, given: Json, read: dict[Any, torch.Tensor]) -> torch.Tensor:
    entry = table(given, "tensor", "path_name", "is_param", "use_pickle", "tensor_meta")
    if entry["use_pickle"] is not False or entry["tensor_meta"] is None:
        raise RewriteError(f"it holds a pickled object {shown(entry['path_name'])}, which could run code")
    meta = table(entry["tensor_meta"], "tensor", "dtype", "sizes", "strides", "storage_offset", "requires_grad", "device")
    place, dtype = folder + checked.part(entry["path_name"], "entry"), _dtype(meta["dtype"])
    if (place, dtype) not in read:
        read[place, dtype] = _bytes_of(archive, place, dtype)
    made = _view(read[place, dtype], meta, shown(place))
    home = device(table(meta["device"], "device", "type")["type"])
    made = made.to(home) if home.type != "meta" else torch.empty_like(made, device="meta")
    trained = checked.truth(meta["requires_grad"], "requires_grad") and made.is_floating_point()
    if checked.truth(entry["is_param"], "kind of tensor"):
        return torch.nn.Parameter(made, requires_grad=trained)
    return made


def _bytes_of(archive: Archive, place: str, dtype: torch.dtype) -> torch.Tensor:
    held = archive.size(place)
    if held % dtype.itemsize:
        raise RewriteError(f"its entry {shown(place)} has {held} bytes, which are no whole number of {dtype}")
    flat = torch.empty(held // dtype.itemsize, dtype=dtype)
    if held:
        archive.read_into(place, buffer_of(flat))
    return flat


def _view(flat: torch.Tensor, meta: Mapping[str, Any], place: str) -> torch.Tensor:
    """The bytes in the sizes and strides of the table, which must stay within them."""
    sizes = [_number(s) for s in items(meta["sizes"], "sizes", DIMENSIONS)]
    strides = [_number(s) for s in items(meta["strides"], "strides", DIMENSIONS)]
    offset = _number(meta["storage_offset"])
    if len(sizes) != len(strides):
        raise RewriteError(f"its entry {place} has other strides than sizes")
    empty = not math.prod(sizes)
    last = offset + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
    if not empty and last > flat.numel():
        raise RewriteError(f"its entry {place} has {flat.numel()} numbers, where a tensor of {last} is to be")
    return flat.new_empty(sizes) if empty else flat.as_strided(sizes, strides, offset)


def _number(value: Json) -> int:
    return size(table(value, "size", "as_int")["as_int"])


def _dtype(value: Json) -> torch.dtype:
    known = {int(member) for member in schema.ScalarType if member is not schema.ScalarType.UNKNOWN}
    if checked.whole(value, "dtype") not in known:
        raise RewriteError(f"it holds a tensor of the dtype {shown(value)}, which this torch does not have")
    found = serialize.deserialize_scalar_type(schema.ScalarType(value))
    assert isinstance(found, torch.dtype)
    return found
