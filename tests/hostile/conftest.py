"""One oracle and one set of good files for all hostile tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.archives import Parts, make_parts
from tests.hostile.harness import Oracle


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as made:
        yield made


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("parts"))
