"""Each private name of torch that the engine leans on is still there: the failing case names the one that is gone."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from rewrite import torch_private


def resolved(name: str) -> Any:
    """The object behind a dotted name."""
    path, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(path), attribute)
    except ModuleNotFoundError:
        return getattr(resolved(path), attribute)


@pytest.mark.parametrize("name", torch_private.NAMES)
def test_a_private_name_is_there(name: str) -> None:
    assert resolved(name) is not None


@pytest.mark.parametrize("name", torch_private.ATTRIBUTES)
def test_a_private_attribute_is_there(name: str) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.zeros(3, 2),))
    graph = exported.module().graph
    call = next(n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.linear.default)
    custom = torch.library.custom_op("rewrite_test::name_probe", mutates_args=())(probe)
    assert any(hasattr(each, name) for each in (exported, graph, call.target, nn.Linear(2, 2), custom, torch.ones(1)))


def probe(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def test_conditions_are_read_without_a_default() -> None:
    class Bare:
        """An export of a torch that keeps its conditions elsewhere."""

    with pytest.raises(AttributeError, match="_guards_code"):
        torch_private.guards_code(Bare())  # type: ignore[arg-type]


def test_conditions_are_what_the_export_found() -> None:
    class Halved(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(x.shape[0] // 2, 2, 3) if x.shape[0] % 2 == 0 else x

    dynamic = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(Halved(), (torch.zeros(4, 3),), dynamic_shapes=dynamic)
    assert any("2" in line for line in torch_private.guards_code(exported))
