"""Mends for broken installations of libraries that models come from."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.util import find_spec

import torch


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
