"""What all tests need: a torchvision that the model libraries can import, few threads, the gpu marker."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from rewrite.sources.compat import mend_torchvision

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


mend_torchvision()


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
