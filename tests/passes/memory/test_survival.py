"""Every memory pass on one model: gradients and kept bytes wherever the model goes, and the ONNX graph as without it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rewrite
from rewrite.training.saved import kept_bytes
from tests.captures import capture

PASSES = (
    "compress-activations{min_size=1 group=8}",
    "few-bit",
    "share-norm",
    "randomized-linear{ratio=0.5}",
    "paca{rank=5}",
    "velora{width=8}",
    "recompute",
    "offload{min_size=1}",
    "fit-memory{budget=0.5 min_size=1}",
)
ROUNDED = ("compress-activations", "fit-memory")
"""Compiled, other tensors are rounded, and by other numbers."""

X = torch.randn(10, 24)


class Block(nn.Module):
    """x + down(dropout(gelu(up(norm(x)))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act = nn.LayerNorm(24, elementwise_affine=False), nn.Linear(24, 40), nn.GELU()
        self.drop, self.down = nn.Dropout(0.2), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.down(self.drop(self.act(self.up(self.norm(x)))))
        return found


@functools.cache
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), Block(), Block(), nn.Linear(24, 4))


def gradients(module: Any, run: Any = None) -> list[Tensor]:
    """Of all that trains, in one step from the same seed; by ``backward``, as DDP wants it."""
    module.train().zero_grad()
    torch.manual_seed(1)
    (run or module)(X).square().sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def kept(module: Any, run: Any = None) -> int:
    torch.manual_seed(1)
    return kept_bytes(module.train(), ((X,), {}), run or module)


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("text", PASSES)
def test_it_survives_every_way_that_a_model_goes(text: str, tmp_path: Path) -> None:
    program = rewrite.apply(net(), text, args=(X,), verify=False)
    wanted, size = gradients(program.module), kept(program.module)
    assert program.history[-1].changed
    assert size < kept(net()) or text.startswith("offload")  # on the CPU everything is on the host
    grafted = rewrite.graft(program, net())
    again = capture(grafted, (X,))
    torch.save(grafted, tmp_path / "net.pt")
    forms = {
        "copied": copy.deepcopy(program.module),
        "loaded": rewrite.load(rewrite.save(program, tmp_path / "net.pt2")).module,
        "grafted": grafted,
        "copied after": copy.deepcopy(grafted),
        "pickled": torch.load(tmp_path / "net.pt", weights_only=False),
        "captured again": again.module,
        "the same again": rewrite.apply(again, text, verify=False).module,
        "another pass": rewrite.apply(again, "offload", verify=False).module,
        "DDP": DistributedDataParallel(copy.deepcopy(grafted)),
    }
    for name, module in forms.items():
        assert all(map(torch.allclose, wanted, gradients(module))), name
        assert kept(module) == size, name
    compiled = torch.compile(grafted, backend="aot_eager", fullgraph=not program.properties)
    made, near = gradients(grafted, compiled), 0.1 if text.startswith(ROUNDED) else 1e-5
    assert all(float((a - b).norm()) <= near * float(a.norm()) for a, b in zip(wanted, made, strict=True))
    assert kept(grafted, compiled) < kept(net())
    read = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(read(X), net().eval()(X))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The ONNX graph of the model as it is."""
    return operators(capture(net(), (X,)), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("text", PASSES)
def test_for_inference_nothing_is_left_and_autocast_computes_the_same(text: str, plain: str, tmp_path: Path) -> None:
    program = rewrite.apply(net(), text, args=(X,), verify=False)
    assert operators(program, tmp_path) == plain
    with torch.autocast("cpu", torch.bfloat16):
        outputs = []
        for module in (net(), program.module):
            torch.manual_seed(2)
            outputs.append(module.train()(X))
        assert torch.equal(*outputs)
        made = gradients(program.module)
    assert made
    assert all(bool(g.isfinite().all()) for g in made)


def operators(program: rewrite.Program, folder: Path) -> str:
    """The ONNX graph, without names and weights."""
    file = rewrite.export_onnx(program, folder / "net.onnx")
    return str([(n.op_type, [*n.attribute]) for n in onnx.load(file).graph.node])
