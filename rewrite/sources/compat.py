"""Mends for broken installations of libraries that models come from."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TypeVar

import torch

from rewrite.errors import first_line


@functools.cache
def mend_torchvision() -> torch.library.Library | None:
    """Define the two operators without which a torchvision of another build than torch cannot be imported.

    timm imports torchvision, and beside a CPU build of torch there is none that fits. Returns the library that holds
    the operators (they go with the object), or None where torchvision is absent or whole.
    """
    if find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library


T = TypeVar("T")

# transformers imports it late, and hides the reason when that fails
_NEED_TORCHVISION = {"timm", "torchvision", "transformers"}


def import_mended(name: str) -> types.ModuleType:
    """Import a module, with torchvision mended before it or, where nobody knew that it is needed, after it failed."""
    if name.partition(".")[0] in _NEED_TORCHVISION:
        _needed_mending()
    return mended(lambda: importlib.import_module(name))


def mended(action: Callable[[], T]) -> T:
    """What the action returns; one that fails beside a torchvision in need of mending is tried again."""
    try:
        return action()
    except Exception:
        if not _needed_mending():
            raise
    return action()


def _needed_mending() -> bool:
    """Whether torchvision was broken and is now mended; one past that is the business of whoever imports it."""
    with suppress(Exception):
        return mend_torchvision() is not None
    return False


def why_import_fails(error: Exception) -> str:
    """The reason on one line, and the way out of the most common one."""
    reason = first_line(error)
    if "torchvision" in reason and "does not exist" in reason:
        return f"{reason}: the installed torchvision was built for another torch; install the two together"
    return reason
