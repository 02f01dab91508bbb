"""compress-activations: the models the kit tries it on, bytes by the closed form, its rounding, and where it lives."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import ESTIMATE, SAME, Contract, Pass, RewriteError, option
from rewrite.sources.pickles import load_module
from rewrite.training.allotment import allotted
from rewrite.training.float8 import float_bytes, floats, from_floats
from rewrite.training.groups import as_pair, grouped_bytes, quantized, restored
from rewrite.training.heads import ByHead
from rewrite.training.packer import Packer, Storages
from rewrite.training.packing import packed_bytes
from rewrite.training.sensitivity import sensitivities, separated
from tests.captures import capture, shared
from tests.passes.table import Row

ROWS = [
    Row("compress-activations{min_size=64}", "gpt2", {"saved_tensors"}),
    Row("compress-activations{bits=4 group=64 min_size=64}", "llama", {"saved_tensors"}),
    Row("compress-activations{min_size=64 rounding=nearest}", "vit", {"saved_tensors"}),
    Row("compress-activations{min_size=64 groups=heads}", "resnet18", {"saved_tensors"}),
    Row("compress-activations{bits=auto min_size=64}", "vit", {"saved_tensors"}, data=lambda: images()),
    Row("compress-activations", "Frozen", 0),
]

X = torch.randn(32, 64)


def images() -> list[Tensor]:
    """A batch for the ViT."""
    generator = torch.Generator().manual_seed(0)
    (example,) = [t for t in [*shared("vit").example_args, *shared("vit").example_kwargs.values()] if t is not None]
    return [torch.randn(example.shape, generator=generator)]


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


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_is_above_0_behind_a_relu_stays_above_0(bits: int) -> None:
    x = torch.randn(2000).relu()
    kept = quantized(x, bits, 64, torch.Generator().manual_seed(0))
    assert kept is not None
    back = restored(kept)
    assert torch.equal(back > 0, x > 0)
    assert bool(((back - x).abs() <= x.max() / (2**bits - 1) + 1e-6).all())


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
        "captured again": capture(grafted, (X,)).module,
        "compiled": torch.compile(copy.deepcopy(grafted), backend="aot_eager"),
    }
    for name, module in forms.items():
        made = gradients(module)
        assert all(map(torch.equal, wanted, made)) or (name == "compiled" and error(wanted, made) < 0.02), name
    read = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(read(X), model.eval()(X))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float8_is_off_by_at_most_one_spacing(dtype: torch.dtype) -> None:
    x = torch.randn(1003).to(dtype)
    for generator, most in ((None, 2**-4), (torch.Generator().manual_seed(0), 2**-3)):
        kept = floats(x, 16, generator)
        assert kept is not None
        assert kept.rows.nbytes + kept.scale.nbytes == float_bytes(1003, 16, dtype)
        back = from_floats(kept)
        assert back.dtype is dtype
        top = torch.nn.functional.pad(x.float(), (0, 5)).view(-1, 16).abs().amax(1).repeat_interleave(16)[:1003]
        coarse = 2**-7 if dtype is torch.bfloat16 else 1e-6
        off = (back.float() - x.float()).abs()
        assert bool((off <= (most + coarse) * x.float().abs() + (most + coarse) * top * 2**-6 / 448 * 8).all())
    assert floats(torch.tensor([torch.nan] * 16), 16, None) is None
    assert torch.equal(there_and_back(torch.zeros(20)), torch.zeros(20))


def there_and_back(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    kept = floats(x, 16, generator)
    assert kept is not None
    return from_floats(kept)


def test_the_mean_of_stochastic_float8_is_the_number() -> None:
    x, generator = torch.randn(256), torch.Generator().manual_seed(0)
    draws = torch.stack([there_and_back(x, generator) for _ in range(2000)])
    deviation = draws.std(0) / len(draws) ** 0.5
    seldom = 5 * x.abs() / 8 / len(draws)
    assert bool(((draws.mean(0) - x).abs() <= 5 * deviation + seldom + 1e-7).all())


def test_float8_in_a_model() -> None:
    """Four tensors as in the closed form of whole numbers, with a scale for each group alone."""
    program = rewrite.apply(net(), "compress-activations{format=fp8 group=16}", args=(X,))
    kept = {each.path: each.bytes for each in rewrite.memory(program).kept if each.dtype == "float8_e4m3fn"}
    assert list(kept.values()) == [32 * 256] * len(kept)
    exact, got = gradients(net().eval()), gradients(program.module)
    assert 0 < error(exact, got) < 0.15
    with pytest.raises(RewriteError, match="fp8 has 8 bits"):
        rewrite.apply(net(), "compress-activations{format=fp8 bits=4}", args=(X,))


@pytest.mark.parametrize("shape", [(3, 4, 5, 16), (6, 5, 32), (10, 32)])
def test_a_group_is_a_head(shape: tuple[int, ...]) -> None:
    """Heads of very different sizes do not disturb each other; any dense layout comes back as it lay."""
    tensor = torch.randn(shape)
    by_head = tensor if tensor.dim() == 4 else tensor.unflatten(-1, (4, -1))
    axis = 1 if tensor.dim() == 4 else by_head.dim() - 2
    sizes = torch.tensor([1e-3, 1.0, 1e3, 10.0]).view([-1 if i == axis else 1 for i in range(by_head.dim())])
    tensor = (by_head * sizes).reshape(shape)
    for given in (tensor, tensor.transpose(-1, -2).contiguous().transpose(-1, -2)):
        packer = Packer(Storages(frozenset()), {"bits": 8, "group": 256, "rounding": "nearest", "min_size": 1, "heads": 4})
        packed = packer.pack(given)
        assert type(packed.storage) is ByHead
        assert packed.storage.numbers.low.numel() == 4
        back = packer.unpack(packed)
        assert back.stride() == given.stride()
        off = (back - given) if tensor.dim() == 4 else (back - given).unflatten(-1, (4, -1))
        assert bool((off.abs() <= 8 / 255 * sizes).all())


def test_bits_are_allotted_where_they_cost_least() -> None:
    assert allotted([1e6, 2.0, 1.0], [100, 100, 100], 14 / 3) == [8, 4, 2]
    assert allotted([0.0, 0.0], [10, 10], 8) == [8, 8]
    assert allotted([5.0, 1.0], [10, 1000], 2) == [2, 2]


def test_squares_are_separated_from_signed_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(50, 12, generator=generator, dtype=torch.float64))[0].t()
    sizes = torch.rand(12, generator=generator, dtype=torch.float64)
    signs = 2.0 * torch.randint(2, (9, 12), generator=generator) - 1.0
    found, deviation = separated(signs.double(), signs.double() @ (sizes[:, None].sqrt() * rows))
    assert deviation < 1e-10
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), sizes, atol=1e-10)


def test_sensitivities_are_what_rounding_each_tensor_alone_does() -> None:
    """The variance that 4 bits in one tensor cause, by 40 draws for each, against all of them from a few passes."""
    program = capture(wide(), (X,))
    found = sensitivities(program, [X], 64, 0)
    alone = []
    exact = projected(program.clone().module)
    for place in range(len(found)):
        bits = [4 if i == place else 8 for i in range(len(found))]
        module = rewrite.apply(program, [Bits(str(bits))], verify=False).module
        torch.manual_seed(0)
        draws = [projected(module) for _ in range(40)]
        alone.append(sum(error(exact, draw) ** 2 for draw in draws) / 40)
    mine = torch.tensor([each.cost for each in found], dtype=torch.float64).sqrt()
    true = torch.tensor(alone, dtype=torch.float64).sqrt()
    assert float(torch.corrcoef(torch.stack([mine, true]))[0, 1]) > 0.9


def projected(module: nn.Module) -> list[Tensor]:
    """The gradient of the projection of the outputs that sensitivities are measured by."""
    y = module.train()(X)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return list(torch.autograd.grad((y * weights).sum(), list(module.parameters())))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 4)
    )


def test_bits_by_data_are_better_than_the_same_for_all() -> None:
    """All that is known goes through 16 numbers, which take few bits in all."""
    torch.manual_seed(0)
    narrow = nn.Sequential(
        nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 16), nn.GELU(), nn.Linear(16, 512), nn.SiLU(), nn.Linear(512, 4)
    )
    program = capture(narrow, (X,))
    exact = gradients(program.clone().module, seed=None)
    errors, sizes = [], []
    for text in ("bits=auto average=4", "bits=4"):
        made = rewrite.apply(program, f"compress-activations{{{text} min_size=64}}", data=[X], verify=False)
        torch.manual_seed(0)
        errors.append(sum(error(exact, gradients(made.module, seed=None)) for _ in range(20)) / 20)
        sizes.append(rewrite.memory(made).bytes)
    assert errors[0] < 0.9 * errors[1]
    assert sizes[0] <= 1.01 * sizes[1]
    with pytest.raises(RewriteError, match="needs data"):
        rewrite.apply(program, "compress-activations{bits=auto}")


@dataclass(frozen=True)
class Bits(Pass):
    """Sets the bits of each tensor."""

    name = "bits-of-each"
    bits: str = option("[8]", "bits, as JSON")

    def contract(self) -> Contract:
        return Contract(forward=SAME, backward=ESTIMATE)

    def run(self, program: Any, context: Any) -> None:
        value = {"bits": json.loads(self.bits), "group": 256, "rounding": "stochastic", "min_size": 64}
        context.edit.set_property("saved_tensors", value)


def test_buffers_that_move_in_the_backward_may_move_with_the_gradient() -> None:
    """online-norm's controls follow the gradient, which is an estimate; in the forward nothing else may change."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    program = rewrite.apply(model, "online-norm,compress-activations{min_size=64}", args=(torch.randn(4, 3, 8, 8),))
    checks = {check.name: check.detail for check in program.history[-1].verification.checks}
    assert checks["properties, train"] == "outputs and buffers bit for bit"
