"""What all tests need: a torchvision that the model libraries can import, few threads, the gpu marker."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import find_spec

import hypothesis
import pytest
import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


def mend_torchvision() -> torch.library.Library | None:
    """Define the two operators without which a torchvision of another build than torch cannot be imported.

    Returns the library that holds them, or None where torchvision is absent or whole.
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


TORCHVISION = mend_torchvision()  # kept: the operators go with the object


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    # a first call that captures or compiles is slow, and says nothing about the code under test
    hypothesis.settings.register_profile("rewrite", deadline=None)
    hypothesis.settings.load_profile("rewrite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
