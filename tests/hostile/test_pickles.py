"""Hostile pickles by the command line: the files that `tests/rewrite/sources` has load_module refuse, and some more."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.hostile.harness import MARKER, Case, Oracle
from tests.rewrite.sources.test_pickles import (
    OBJECTS,
    OPCODES,
    PLAIN_CALLS,
    TRICKS,
    call,
    name,
    rebuilt,
    text,
    with_attribute,
    write,
)

BODIES = {
    **{f"call: {k}": with_attribute(call(name(*v), text(f"touch {MARKER}"))) for k, v in PLAIN_CALLS.items()},
    **{f"object: {k}": with_attribute(rebuilt(name(*v), {"args": text(MARKER)})) for k, v in OBJECTS.items()},
    **{f"trick: {k}": v for k, v in TRICKS.items()},
    **{f"opcode: {k}": with_attribute(v) for k, v in OPCODES.items()},
    "nested": with_attribute(b")" + b"\x85" * 200_000),
    "nested lists": with_attribute(b"]" * 100_000 + b"a" * 99_999),
    "nothing": b"",
    "marks": b"(" * 100_000,
    "a memo without end": with_attribute(b"h\xff"),
    "a number of many bytes": with_attribute(b"\x8a\xff" + b"\xff" * 255),
    "a cut text": b"X\xff\xff\xff\x7fabc",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_hostile_pickle_is_refused_in_one_line(body: bytes, oracle: Oracle, tmp_path: Path) -> None:
    write(tmp_path / "m.pt", body)
    judged(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2")


def bomb(path: Path) -> Path:
    """A file of torch.save's in which half a gigabyte of zeros is compressed to half a megabyte."""
    torch.save(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
        with archive.open("m/data/9", "w") as large:
            for _ in range(512):
                large.write(bytes(1 << 20))
    return path


def test_a_compressed_model_is_refused_before_it_grows(oracle: Oracle, tmp_path: Path) -> None:
    bomb(tmp_path / "m.pt")
    judged(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2")


def test_an_entry_whose_name_is_no_text_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    found = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(found.replace(b"/data/0", b"/data/\xcc"))
    judged(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2")


def test_a_version_beyond_any_number_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, b"9" * 30 if entry.endswith("/version") else content)
    judged(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2")


def test_compressed_weights_are_refused_before_they_grow(oracle: Oracle, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    bomb(tmp_path / "w.pt")
    judged(oracle, tmp_path, "show", "m.pt", "--inputs", "2x2", "--weights", "w.pt")


def judged(oracle: Oracle, folder: Path, *argv: str) -> None:
    verdict = oracle.judge(Case(argv, folder))
    assert (verdict.code, verdict.faults) == (2, ())
