"""Operators that ONNX lacks, taken apart one by one: against torch's own way, and where only that one is right."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rewrite.backends.onnx.decompose import Decomposed
from rewrite.backends.onnx.quickened import quickened

Way = Callable[[ExportedProgram], ExportedProgram]


class Each(nn.Module):
    """A function as a module, with a convolution and a norm before it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.conv, self.function = nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(self.norm(x)))


def exported(function: Callable[[Tensor], Tensor]) -> tuple[ExportedProgram, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Each(function).eval(), torch.randn(3, 4, 5)
    return torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO, 2: Dim.AUTO},)), model, x


def whole() -> mock._patch[mock.MagicMock]:
    """What notes when torch takes the whole program apart."""
    own = ExportedProgram.run_decompositions
    return mock.patch.object(ExportedProgram, "run_decompositions", autospec=True, side_effect=own)


def of_viewed(x: Tensor) -> Tensor:
    view = x.view(-1)
    x.add_(1.0)
    return view * 2.0


def viewed_of(x: Tensor) -> Tensor:
    first = x[0]
    first.mul_(2.0)
    return x


def to_parts(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return first.flatten(1) @ second.flatten(1).T


ALONE = {
    "rms_norm": lambda x: nn.functional.rms_norm(x, (x.shape[-1],)),
    "relu_": lambda x: x.relu_(),
    "add_, read before and behind": lambda x: (y := x.sigmoid(), y.exp(), y.add_(x), y * 2)[-1],
    "add_ under two names": lambda x: (y := x.sigmoid(), z := torch.broadcast_tensors(y, x)[0], y.add_(1.0), z * 2)[-1],
    "chunk, flatten": to_parts,
    "adaptive_avg_pool1d": lambda x: nn.functional.adaptive_avg_pool1d(x, 1),
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "several results": lambda x: torch.var_mean(x, 1)[0] + torch.std_mean(x, 1)[1],
    "its input": lambda x: x.to(x.dtype),
}


@pytest.mark.parametrize("name", ALONE)
def test_it_computes_what_torch_takes_apart(name: str) -> None:
    program, model, x = exported(ALONE[name])
    table = torch.export.default_decompositions()
    with quickened() as known, whole() as torchs:
        found = Decomposed.of(program, known).run_decompositions(table)
    assert not torchs.called
    expected = program.run_decompositions(table)
    for value in (x, torch.randn(7, 4, 2)):
        assert torch.allclose(found.module()(value), expected.module()(value), atol=1e-6)
        assert torch.allclose(found.module()(value), model(value), atol=1e-6)
    kinds, torchs_kinds = ({n.target for n in p.graph.nodes if n.op == "call_function"} for p in (found, expected))
    assert kinds & set(table) <= {*torchs_kinds, torch.ops.aten.sym_size.int}  # which reads a size


@pytest.mark.parametrize("function", [of_viewed, viewed_of])
def test_torch_takes_apart_what_is_written_under_two_names(function: Callable[[Tensor], Tensor]) -> None:
    program, model, x = exported(function)
    with quickened() as known, whole() as torchs:
        found = Decomposed.of(program, known).run_decompositions(torch.export.default_decompositions())
    assert torchs.called
    assert torch.allclose(found.module()(x), model(x), atol=1e-6)


def test_torch_takes_apart_what_runs_graphs_of_its_own() -> None:
    def chosen(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    program, model, x = exported(chosen)
    with quickened() as known, whole() as torchs:
        found = Decomposed.of(program, known).run_decompositions(torch.export.default_decompositions())
    assert torchs.called
    assert torch.equal(found.module()(x), model(x))


def test_rules_look_at_nodes_of_their_kind_alone() -> None:
    """The names that this leans on are there; a rule of two results is not tried on another kind of node."""
    from onnxscript.rewriter import _matcher

    own = _matcher.SimplePatternMatcher.match
    with quickened() as known:
        assert _matcher.SimplePatternMatcher.match is not own
        assert {"aten::reshape", "aten::add.Tensor"} <= known
    assert _matcher.SimplePatternMatcher.match is own


def test_what_is_alike_is_traced_once() -> None:
    program, _, _ = exported(lambda x: nn.functional.rms_norm(nn.functional.rms_norm(x + 1, (x.shape[-1],)), (x.shape[-1],)))
    with quickened() as known, mock.patch("rewrite.backends.onnx.decompose._Apart._traced", autospec=True) as traced:
        traced.side_effect = AssertionError("once")
        with pytest.raises(AssertionError, match="once"):
            Decomposed.of(program, known).run_decompositions(torch.export.default_decompositions())
    assert traced.call_count == 1
