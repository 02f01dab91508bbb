"""What autograd keeps: against what the allocator says, by hand, under properties, compiled, and without a trace."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import rewrite
from rewrite import Program, RewriteError
from rewrite.testing.observe import bytes_of, tensors, untouched
from tests.captures import capture, shared
from tests.rewrite.graph.test_properties import SetProperty, announce

X = torch.randn(6, 8)


def left_allocated(program: Program) -> int:
    """The bytes that one forward in training leaves allocated, results that autograd does not keep left aside."""
    module, args, kwargs = program.clone().module.train(), program.example_args, dict(program.example_kwargs)
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    module(*args, **kwargs)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        outputs = module(*args, **kwargs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(outputs)}
    only_results = sum(count for address, count in storages.items() if address not in kept)
    return sum(int(event.self_cpu_memory_usage) for event in profiler.key_averages()) - only_results


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("step", ["", "few-bit"])
def test_the_allocator_agrees(name: str, step: str) -> None:
    program = shared(name)
    program = rewrite.apply(program, step, verify=False) if step else program
    assert rewrite.memory(program).bytes == pytest.approx(left_allocated(program), rel=0.01)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 4))


def test_by_hand() -> None:
    """GELU keeps its input, dropout its mask (float, here on the CPU) and the last layer what goes into it."""
    found = rewrite.memory(net(), (X,))
    assert [(each.path, each.kind, each.dtype, each.tensors, each.bytes) for each in found.kept] == [
        ("1", "GELU", "float32", 1, 384),
        ("2", "Dropout", "float32", 1, 384),
        ("3", "Linear", "float32", 1, 384),
    ]
    assert found.bytes == 1152
    assert list(found.by_kind()) == ["GELU", "Dropout", "Linear"]
    assert json.loads(json.dumps(found.to_json()))["bytes"] == 1152
    assert str(found).splitlines()[-1].split() == ["total", "1,152"]


def test_other_inputs_and_half_the_bytes_in_bfloat16() -> None:
    program = capture(net(), (X,))
    assert rewrite.memory(program, (torch.randn(12, 8),)).bytes == 2304
    assert rewrite.memory(net().bfloat16(), (X.bfloat16(),)).bytes == 576


def test_what_is_shared_counts_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.q(y) + self.k(y).flatten()[None, :8]

    assert [(each.path, each.bytes) for each in rewrite.memory(Shared(), (X,)).kept] == [("q", 192)]


def test_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    program = capture(model, (X,))
    before, state = bytes_of(program.module), torch.get_rng_state()
    rewrite.memory(program)
    assert untouched(program.module, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in program.module.parameters())


def test_compiled_it_is_measured_as_one() -> None:
    found = rewrite.memory(net(), (X,), backend="inductor")
    assert {each.kind for each in found.kept} == {"compiled"}
    assert 0 < found.bytes <= 1152


def test_under_a_property_it_is_what_that_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch)
    program = rewrite.apply(net(), [SetProperty()], args=(X,))
    own_copy_of_the_input = X.numel() * 2
    assert rewrite.memory(program).bytes == 1152 // 2 + own_copy_of_the_input


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RewriteError, match="eager or inductor, not 'onnx'"):
        rewrite.memory(net(), (X,), backend="onnx")
    with pytest.raises(RewriteError, match="meta device"):
        rewrite.memory(net().to("meta"), (X.to("meta"),))
