"""paca and merge-paca: the models the kit tries them on, the gradient of the columns, what is kept, and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("paca{rank=8}", "gpt2", 16),
    Row("paca{rank=8 where=layers.0.*}", "vit", 12),
    Row("paca", "vit", 0, near_miss={"layers.0.mlp.fc1": "it has no more than 64 inputs"}),
    Row("merge-paca", "vit", 12, after="paca{rank=8 where=layers.0.*}"),
    Row("merge-paca", "vit", 0),
]

X = torch.randn(10, 24)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Dropout(0.1), nn.Linear(32, 48), nn.Dropout(0.1), nn.Linear(48, 4))


def test_only_the_columns_train_and_only_their_inputs_are_kept() -> None:
    model = net()
    program = rewrite.apply(model, "paca{rank=5}", args=(X,))
    trained = {name for name, p in program.module.named_parameters() if p.requires_grad}
    assert trained == {"0.weight", "0.bias", "2.columns", "4.columns"}
    assert torch.equal(program.module.eval()(X), model.eval()(X))
    before, after = rewrite.memory(model, (X,)).bytes, rewrite.memory(program).bytes
    assert before - after == 10 * (32 + 48 - 5 - 5) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradients_are_those_of_the_columns(dtype: torch.dtype) -> None:
    model = net().to(dtype).eval()
    program = rewrite.apply(model, "paca{rank=5}", args=(X.to(dtype),))
    module, x = program.module.eval(), X.to(dtype)
    loss, twin = module(x).square().sum(), model(x).square().sum()
    for path in ("2", "4"):
        layer: Any = module.get_submodule(path)
        (got,) = torch.autograd.grad(loss, layer.columns, retain_graph=True)
        (true,) = torch.autograd.grad(twin, model.get_submodule(path).weight, retain_graph=True)
        assert torch.allclose(got, true[:, layer.places], rtol=1e-5 if dtype is torch.float32 else 1e-12)


def trained(module: nn.Module) -> Tensor:
    """The outputs after three steps on what trains."""
    module.eval()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(X).square().sum().backward()
        optimizer.step()
    found: Tensor = module(X).detach()
    return found


def test_what_was_trained_merges_exactly() -> None:
    model = net()
    program = rewrite.apply(model, "paca{rank=5}", args=(X,))
    grafted = rewrite.graft(program, model)
    wanted = trained(grafted)
    merged = rewrite.apply(capture(grafted, (X,)), "merge-paca")
    assert torch.equal(merged.module.eval()(X), wanted)
    assert type(merged.module.get_submodule("2")) is nn.Linear
    assert {*merged.module.state_dict()} == {*net().state_dict()}


def test_a_seed_draws_the_columns() -> None:
    places = [
        rewrite.apply(net(), f"paca{{rank=5 seed={seed}}}", args=(X,)).module.get_buffer("2.places") for seed in (0, 0, 1)
    ]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


def test_a_weight_of_which_the_code_reads_the_dtype_alone_may_be_another() -> None:
    query = "encoder.block.0.layer.0.SelfAttention.q"
    program = rewrite.apply(shared("t5"), f"paca{{rank=8 where={query}}}")
    assert f"{query}.weight" in [n.target for n in program.graph.nodes if n.op == "get_attr"]
    assert not program.module.get_parameter(f"{query}.weight").requires_grad


def test_columns_grow_with_the_outputs_and_hold_the_inputs() -> None:
    program = rewrite.apply(shared("PreNormDecoder"), "paca{rank=3 where=layers.*.up},expand{ffn=2x}")
    columns = {name: p for name, p in program.module.named_parameters() if name.endswith("columns")}
    assert columns.keys() == {"layers.0.up.columns", "layers.1.up.columns"}
    assert all(p.shape == (32, 3) for p in columns.values())
    for text in ("expand{ffn=2x}", "expand{method=net2net channels=+2}"):
        with pytest.raises(rewrite.RewriteError, match="paca trains some of its inputs, by number"):
            rewrite.apply(shared("PreNormDecoder"), f"paca{{rank=3}},{text}")
