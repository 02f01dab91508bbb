"""What all tests need: a torchvision that the model libraries can import, few threads, the gpu marker, tests of one
model side by side in one worker, and the same random numbers whatever ran before.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from rewrite.sources.compat import mend_torchvision
from rewrite.testing import FreshProcess
from tests.captures import STORE, capture
from tests.fast import left_out

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


mend_torchvision()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out what tests/fast.py names")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)
    # a first call that captures or compiles is slow, and says nothing about the code under test
    hypothesis.settings.register_profile("rewrite", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("rewrite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        slow = left_out(items)
        items[:] = [item for item in items if item not in set(slow)]
        config.hook.pytest_deselected(items=slow)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at these millions of objects again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _group(item: pytest.Item) -> str:
    """The model that a parametrized test is about, else its file: a worker captures once (`--dist loadgroup`)."""
    given = getattr(item, "callspec", None)
    name = given.params.get("name") if given else None
    return name if isinstance(name, str) else item.path.name


def pytest_collectstart() -> None:
    """Tensors that a test module makes while it is imported are the same in every selection of tests."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on the tests before it in its worker."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fresh_process() -> Iterator[FreshProcess]:
    """A process that has loaded nothing, for all tests of a worker."""
    with FreshProcess() as process:
        yield process


@pytest.fixture(scope="session", autouse=True)
def captures_made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder that all workers of this test run share, for what one captured; `apply` on a model remembers, too."""
    own = tmp_path_factory.getbasetemp()
    STORE.folder[:] = [own.parent if "PYTEST_XDIST_WORKER" in os.environ else own]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewrite.pipeline.run.capture", capture)
        patch.setattr("rewrite.testing.subject.capture", capture)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_table_of_onnx_functions() -> Iterator[None]:
    """torch fills its table of ONNX functions anew for every export, a fifth of its time: a worker fills it once."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        fill = ONNXRegistry.from_torchlib
    except (ImportError, AttributeError):  # it is torch's own, and may go
        yield
        return
    filled: dict[Any, Any] = {}

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(sorted(kwargs.items())))
        if key not in filled:
            filled[key] = fill(*args, **kwargs)
        table = copy.copy(filled[key])
        table.functions = {name: [*metas] for name, metas in table.functions.items()}
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield
