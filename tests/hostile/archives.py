"""Archives by hand: a good `.pt2` taken apart, changed, and put together again with digests that fit."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewrite
from rewrite.files.archive import DIGESTS, Writer

Json = Any
PROGRAM, EXPORT = "rewrite/program.json", "models/model.json"


def entries_of(path: Path) -> dict[str, bytes]:
    """The entries of an archive by their names below its root."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}


def write_signed(path: Path, entries: Mapping[str, bytes]) -> Path:
    """An archive as ``rewrite.save`` writes it: its digests fit, whatever it holds."""
    with Writer(path, "model") as writer:
        for name, content in entries.items():
            if name != DIGESTS:
                writer.add(name, content)
    return path


def write_plain(path: Path, entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive as ``torch.export.save`` writes it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)
    return path


class Small(nn.Module):
    """A model with what files hold: layers, a keyword argument, a dropout, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.drop(self.norm(self.first(x))) * self.scale
        return {"out": torch.nn.functional.gelu(hidden, approximate="tanh").clamp(min=-1.0).reshape(x.shape[0] * 2, 2)}


@dataclass(frozen=True)
class Parts:
    """The entries of a good file of this package, and of one of torch.export."""

    own: dict[str, bytes]
    export: dict[str, bytes]

    def changed(self, path: Path, change: Callable[[Json], object]) -> Path:
        """The own file with its program changed in place."""
        program = json.loads(self.own[PROGRAM])
        change(program)
        return write_signed(path, {**self.own, PROGRAM: json.dumps(program).encode()})

    def with_text(self, path: Path, text: str) -> Path:
        """The own file with another text for its program."""
        return write_signed(path, {**self.own, PROGRAM: text.encode()})

    def changed_export(self, path: Path, change: Callable[[Json], object], **more: bytes) -> Path:
        """The export with its graph changed in place, and other entries."""
        document = json.loads(self.export[EXPORT])
        change(document)
        return write_plain(path, {**self.export, EXPORT: json.dumps(document).encode(), **more})


def make_parts(folder: Path) -> Parts:
    """Parts of one small model, saved in both ways."""
    model = Small()
    inputs = (torch.randn(3, 4),)
    rewrite.save(rewrite.apply(rewrite.capture(model, inputs), "dyt", verify=False), folder / "own.pt2")
    exported = torch.export.export(copy.deepcopy(model).eval(), inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(exported, folder / "export.pt2")
    return Parts(entries_of(folder / "own.pt2"), entries_of(folder / "export.pt2"))
