"""Files of data: found, read one at a time, and hashed; none of them runs code."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from rewrite.errors import RewriteError, first_line

from .paths import check_regular, is_folder, is_there, refuse_compressed

LARGEST = 1 << 35
"""How many bytes the arrays of a compressed file may unpack to."""
SUFFIXES = (".npz", ".pt", ".pth", ".safetensors")


def check_files(path: Path) -> tuple[Path, ...]:
    """The files of data at a path, in the order of their names if it is a folder.

    Raises RewriteError where there is nothing, or nothing of these kinds.
    """
    if not is_there(path):
        raise RewriteError(f"there is no file {path}")
    found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if is_folder(path) else [path]
    if not found:
        raise RewriteError(f"there is no {', '.join(SUFFIXES)} in the folder {path}")
    for each in found:
        check_regular(each)
        if each.suffix not in SUFFIXES:
            raise RewriteError(f"{each} is no file of data: give {', '.join(SUFFIXES)}, or a folder of them")
    return tuple(found)


def read(path: Path) -> Any:
    """What a file holds: a dict of tensors, or what ``torch.save`` was given. Raises RewriteError for damage."""
    try:
        if path.suffix == ".npz":
            _check_size(path)
            with numpy.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        refuse_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except RewriteError:
        raise
    except MemoryError:
        raise RewriteError(f"{path} holds more than fits into memory: give a folder of smaller files") from None
    except Exception as error:
        raise RewriteError(
            f"cannot read {path}: {first_line(error)}; save tensors, tuples and dicts of them with torch.save, "
            "numpy.savez or safetensors"
        ) from None


def _check_size(path: Path) -> None:
    """Raises RewriteError for a file that unpacks to more than anybody's samples."""
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > LARGEST:
        raise RewriteError(f"{path} unpacks to {size >> 30} GiB: give a folder of smaller files")


def digest_of(path: Path) -> bytes:
    """The SHA-256 of a file's bytes, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
