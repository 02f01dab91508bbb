"""compress-activations: the models the kit tries it on, bytes by the closed form, its rounding, and where it lives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError
from rewrite.sources.pickles import load_module
from rewrite.training.groups import as_pair, grouped_bytes, quantized, restored
from rewrite.training.packing import packed_bytes
from tests.compare import captured
from tests.passes.table import Row

ROWS = [
    Row("compress-activations{min_size=64}", "gpt2", {"saved_tensors"}),
    Row("compress-activations{bits=4 group=64 min_size=64}", "llama", {"saved_tensors"}),
    Row("compress-activations{min_size=64 rounding=nearest}", "vit", {"saved_tensors"}),
    Row("compress-activations{min_size=64}", "resnet18", {"saved_tensors"}),
    Row("compress-activations", "Frozen", 0),
]

X = torch.randn(32, 64)


def net(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(p), nn.LayerNorm(256), nn.Linear(256, 8))


def gradients(module: nn.Module, x: Tensor = X, seed: int | None = 1) -> list[Tensor]:
    module.train()
    if seed is not None:
        torch.manual_seed(seed)
    return list(torch.autograd.grad(module(x).square().sum(), [p for p in module.parameters() if p.requires_grad]))


def error(true: list[Tensor], made: list[Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in each]) for each in (true, made))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_number_is_off_by_at_most_one_step(bits: int, dtype: torch.dtype, rounding: str) -> None:
    x = torch.randn(1003).to(dtype)
    generator = torch.Generator().manual_seed(0) if rounding == "stochastic" else None
    kept = quantized(x, bits, 64, generator)
    assert kept is not None
    back = restored(kept)
    assert back.dtype is dtype
    steps = torch.nn.functional.pad(x.float(), (0, 21)).view(-1, 64).aminmax(dim=1)
    step = ((steps.max - steps.min) / (2**bits - 1)).repeat_interleave(64)[:1003]
    coarse = 0.03 if dtype.itemsize == 2 else 1e-5  # a minimum and a scale of eight digits
    assert bool(((back.float() - x.float()).abs() <= step * (1.0 if generator else 0.5) + coarse).all())


def test_the_mean_over_draws_is_the_number() -> None:
    x = torch.randn(256)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        kept = quantized(x, 2, 256, generator)
        assert kept is not None
        draws.append(restored(kept))
    stacked = torch.stack(draws)
    deviation = stacked.std(0) / len(draws) ** 0.5
    seldom = 5 * float(x.max() - x.min()) / 3 / len(draws)  # what lies next to a level is hardly ever rounded away
    assert bool(((stacked.mean(0) - x).abs() <= 5 * deviation + seldom).all())


def test_extreme_numbers() -> None:
    assert quantized(torch.tensor([1.0, torch.inf] * 32), 8, 64, None) is None
    assert quantized(torch.tensor([1.0, torch.nan] * 32), 8, 64, None) is None
    mask = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    pair = as_pair(mask)
    assert pair is not None
    assert torch.equal(restored(pair), mask)
    assert as_pair(torch.tensor([0.0, torch.nan])) is None
    same = quantized(torch.full((70,), 3.5), 4, 64, None)
    assert same is not None
    assert torch.equal(restored(same)[:64], torch.full((64,), 3.5))


@pytest.mark.parametrize(("bits", "group"), [(8, 256), (4, 64), (2, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_closed_form(bits: int, group: int, dtype: torch.dtype) -> None:
    """GELU, the norm and the last layer keep 32 x 256 numbers each, dropout a mask; statistics are too few."""
    program = rewrite.apply(
        net().to(dtype), f"compress-activations{{bits={bits} group={group}}}", args=(X.to(dtype),), verify=False
    )
    count = 32 * 256
    statistics = 2 * 32 * 4
    mask = packed_bytes(count, 1) + 2 * dtype.itemsize
    assert rewrite.memory(program).bytes == pytest.approx(
        3 * grouped_bytes(count, bits, group, dtype) + mask + statistics, rel=0.01
    )


def test_the_forward_is_untouched_and_each_step_draws_anew() -> None:
    model = net()
    module = rewrite.apply(model, "compress-activations{min_size=1}", args=(X,)).module
    outputs = []
    for each in (copy.deepcopy(model), module):
        torch.manual_seed(3)
        outputs.append(each.train()(X))
    assert torch.equal(*outputs)
    first, again = gradients(module), gradients(module)
    assert all(map(torch.equal, first, again))
    still = rewrite.apply(net(0.0), "compress-activations{min_size=1}", args=(X,)).module
    one, two = gradients(still), gradients(still, seed=None)
    assert not torch.equal(one[0], two[0])
    assert 0 < error(one, two) < 0.05


def test_gradient_bands() -> None:
    model = net()
    true = gradients(copy.deepcopy(model))
    for bits, low, high in ((8, 0.0005, 0.02), (4, 0.01, 0.3)):
        module = rewrite.apply(model, f"compress-activations{{bits={bits} min_size=1}}", args=(X,)).module
        assert low < error(true, gradients(module)) < high


def test_it_goes_with_the_model(tmp_path: Path) -> None:
    model = net()
    program = rewrite.apply(model, "few-bit,compress-activations{min_size=1}", args=(X,))
    wanted = gradients(program.module)
    grafted = rewrite.graft(program, model)
    torch.save(grafted, tmp_path / "net.pt")
    forms: dict[str, Any] = {
        "loaded": rewrite.load(rewrite.save(program, tmp_path / "net.pt2")).module,
        "grafted": grafted,
        "copied": copy.deepcopy(grafted),
        "read without trust": load_module(tmp_path / "net.pt"),
        "captured again": rewrite.capture(grafted, (X,)).module,
        "compiled": torch.compile(copy.deepcopy(grafted), backend="aot_eager"),
    }
    for name, module in forms.items():
        made = gradients(module)
        assert all(map(torch.equal, wanted, made)) or (name == "compiled" and error(wanted, made) < 0.02), name
    read = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(read(X), model.eval()(X))


def test_the_onnx_graph_is_the_same(tmp_path: Path) -> None:
    program = captured("gpt2")
    made = rewrite.apply(program, "compress-activations", verify=False)
    files = [rewrite.export_onnx(p, tmp_path / f"{i}.onnx") for i, p in enumerate((program, made))]
    assert len({str([(n.op_type, [*n.attribute]) for n in onnx.load(file).graph.node]) for file in files}) == 1


def test_training_follows_the_exact_run() -> None:
    losses = []
    for text in ("", "compress-activations{min_size=1}"):
        torch.manual_seed(5)
        model = net(0.0)
        module = (rewrite.apply(model, text, args=(X,)).module if text else model).train()
        target = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (module(X) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.1
    assert losses[1] == pytest.approx(losses[0], abs=0.01)


@pytest.mark.parametrize("options", ["bits=3", "bits=16", "group=12", "group=0", "rounding=up", "min_size=0"])
def test_other_options_are_refused(options: str) -> None:
    with pytest.raises(RewriteError, match=options.partition("=")[0]):
        rewrite.apply(net(), f"compress-activations{{{options}}}", args=(X,))
