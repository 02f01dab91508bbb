"""What a folder's configuration may ask for, by what its weights hold: asked before anything is built."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from rewrite.errors import RewriteError

from .paths import refuse_special

_COUNTS = re.compile(r".*(layers?|blocks?|depths?|stages?|experts?|n_layer)", re.IGNORECASE)
_CONFIG = 1 << 26


@dataclass(frozen=True)
class Held:
    """What the weights in a folder are: how many tensors, and how many bytes."""

    tensors: int
    bytes: int


def check_folder(folder: Path) -> Held:
    """What a folder's weights hold. Raises RewriteError for a file that is none, and a configuration beyond the weights."""
    files = [path for path in sorted(folder.iterdir()) if not path.is_dir()]
    for path in files:
        refuse_special(path)
    weights = [path for path in files if path.suffix in (".safetensors", ".bin")]
    held = Held(sum(_tensors(path) for path in weights), sum(path.stat().st_size for path in weights))
    _check_counts(_config(folder / "config.json"), held)
    return held


def _tensors(path: Path) -> int:
    """How many tensors a file of weights lists."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                (length,) = struct.unpack("<Q", file.read(8))
                found = json.loads(file.read(length)) if length <= path.stat().st_size else {}
                return len(found)
            return len(zipfile.ZipFile(file).namelist())
    except (OSError, ValueError, RecursionError, NotImplementedError, struct.error, zipfile.BadZipFile):
        raise RewriteError(f"the weights in {path} are damaged or cut short") from None


def _config(path: Path) -> Any:
    if path.stat().st_size > _CONFIG:
        raise RewriteError(f"{path} is larger than any configuration")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise RewriteError(f"{path} is no JSON") from None


def _check_counts(config: Any, held: Held) -> None:
    """A number of layers is at most that of tensors, generously: a layer may have none."""
    most = 10 * held.tensors + 1000
    for key, value in _numbers(config, ""):
        if _COUNTS.fullmatch(key) and abs(value) > most:
            asked = str(value) if abs(value) < 10**12 else "a number without end"
            raise RewriteError(f"its config.json has {key}: {asked}, where its weights are {held.tensors} tensors")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)


@contextmanager
def bounded_by(held: Held) -> Iterator[None]:
    """Building models is stopped once they have many times the modules or parameters that the weights can fill.

    Raises RewriteError from within the code that builds.
    """
    modules, elements = 40 * held.tensors + 10_000, 16 * held.bytes + (1 << 26)
    count = size = 0

    def on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > modules:
            raise RewriteError(
                f"its configuration asks for more than {modules} modules, for weights of {held.tensors} tensors"
            )

    def on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | torch.Tensor | None) -> None:
        nonlocal size
        size += 0 if parameter is None else parameter.numel()
        if size > elements:
            raise RewriteError(f"config.json asks for more than {elements} numbers, for weights of {held.bytes} bytes")

    hooks = register_module_module_registration_hook(on_module), register_module_parameter_registration_hook(on_parameter)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
