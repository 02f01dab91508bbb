"""Good files and texts made bad, with their structure in mind: what a fuzzer draws."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.hostile.harness import MARKER

Json = Any
Draw = Callable[[st.SearchStrategy[Any]], Any]

CODE = f"__import__('os').system('touch {MARKER}')"
NUMBERS = (-1, 0, 1, 2, 2**31, 2**63, 2**64, 10**30, 1e308, float("inf"), float("nan"), -(2**63))
NAMES = (
    "",
    "..",
    "../x",
    "/etc/passwd",
    "a" * 300,
    "x\x00y",
    "é\u202e",
    "class",
    "__class__",
    "0",
    "a.b",
    CODE,
    "antigravity",
)
ODD: tuple[Json, ...] = (None, True, [], {}, [[[]]], {"": None}, *NUMBERS, *NAMES)
OPCODES = (
    *(op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None),
    b"cos\nsystem\n",
    b"cantigravity\nx\n",
    b"cbuiltins\neval\n",
    b"ctorch\nload\n",
    b"X" + struct.pack("<I", len(CODE)) + CODE.encode(),
    b"\x8a\x08" + b"\xff" * 8,
    b"I" + b"9" * 400 + b"\n",
    b"h\xff",
    b"\x93",
    b"(lp0\n",
)


def mutated_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes flipped, cut out, put in, or cut short."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data = draw(
            st.sampled_from(
                [
                    data[:at] + bytes(255 - b for b in data[at : at + 1]) + data[at + 1 :],
                    data[:at] + data[at + draw(st.integers(1, 64)) :],
                    data[:at] + draw(st.binary(min_size=1, max_size=16)) + data[at:],
                    data[:at],
                ]
            )
        )
    return data


def mutated_pickle(draw: Draw, data: bytes) -> bytes:
    """Opcodes put in between those that are there."""
    places = [place for _, _, place in pickletools.genops(data) if place is not None]
    for at in sorted(draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)), reverse=True):
        data = data[:at] + draw(st.sampled_from(OPCODES)) + data[at:]
    return data


def mutated_json(draw: Draw, value: Json) -> Json:
    """Some values, anywhere in the tree, replaced, dropped, doubled, or under another name."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = draw(st.sampled_from(_places(value) or [([None], 0)]))
        kind = draw(st.sampled_from(["odd", "odd", "near", "drop", "double", "rename"]))
        if kind == "odd":
            holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))  # or what is put into it later is put into all
        elif kind == "near":
            holder[key] = _near(draw, holder[key])
        elif kind == "drop":
            holder.pop(key)
        elif kind == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES))] = holder.pop(key)
    return value


def _places(value: Json) -> list[tuple[Json, Any]]:
    """Every container in a tree with each of its keys or positions."""
    found: list[tuple[Json, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *_places(value[key])]
    return found


def _near(draw: Draw, value: Json) -> Json:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return draw(st.sampled_from((value + 1, -value, *NUMBERS)))
    return draw(st.sampled_from(NAMES)) if isinstance(value, str) else value


def as_text(value: Json) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def entries_of(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(entries: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def mutated_entries(draw: Draw, entries: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Entries of an archive dropped, doubled, swapped, renamed, or changed inside by what they are."""
    entries = list(entries)
    for _ in range(draw(st.integers(1, 2))):
        at, other = (draw(st.integers(0, len(entries) - 1)) for _ in range(2))
        name, data = entries[at]
        kind = draw(st.sampled_from(["inside", "inside", "inside", "drop", "double", "swap", "rename"]))
        if kind == "drop" and len(entries) > 1:
            entries.pop(at)
        elif kind == "double":
            entries.insert(at, entries[at])
        elif kind == "swap":
            entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], data)
        elif kind == "rename":
            entries[at] = (name.rpartition("/")[0] + "/" + draw(st.sampled_from(NAMES)).replace("\x00", "0"), data)
        else:
            entries[at] = (name, _inside(draw, name, data))
    return entries


def _inside(draw: Draw, name: str, data: bytes) -> bytes:
    try:
        if name.endswith(".pkl"):
            return mutated_pickle(draw, data)
        if name.endswith(".json"):
            return as_text(mutated_json(draw, json.loads(data)))
    except ValueError:
        pass  # another entry's content was put there before
    return mutated_bytes(draw, data)


def mutated_safetensors(draw: Draw, data: bytes) -> bytes:
    """The header's JSON changed, its length right or wrong."""
    (length,) = struct.unpack("<Q", data[:8])
    header = as_text(mutated_json(draw, json.loads(data[8 : 8 + length])))
    told = draw(st.sampled_from([len(header), len(header), len(header), 2**62, 0, len(header) + 1]))
    return struct.pack("<Q", told) + header + data[8 + length :]


def text_of(draw: Draw, good: tuple[str, ...], pieces: tuple[str, ...]) -> str:
    """A good text with pieces of the grammar, or of nothing, put over it."""
    text = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(0, 4))):
        at, end = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        end = draw(st.sampled_from([at, min(at + 1, len(text)), end]))
        text = text[:at] + draw(st.sampled_from(pieces) | st.text(max_size=4)) + text[end:]
    return text.replace("\x00", "0")
