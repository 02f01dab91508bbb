"""The model's code takes its eager path while it is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from rewrite import RewriteError, capture


class Packed(nn.Module):
    """Masks attention between sequences only where positions say that several are packed in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        breaks = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        y = self.linear(x)
        return y if (breaks[:, -1] == 0).all() else y * breaks.unsqueeze(-1)


class LooksAtTheTrace(nn.Module):
    """Takes a slow path where it sees a compiler or fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)
        return self.linear(x).sin().neg() if traced else self.linear(x)


class Branches(nn.Module):
    """A branch on a tensor that a trace cannot know, or that is not the same for all sizes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[1])
        if self.kind == "written":
            ramp[0] = x.sum().long()
        question = {
            "input": lambda: x.sum() > 0,
            "parameter": lambda: self.weight.sum() > 0,
            "random": lambda: torch.rand(()) < 2,
            "drawn": lambda: torch.zeros(3).uniform_().sum() < 9,
            "bernoulli": lambda: torch.bernoulli(torch.ones(3)).sum() > 0,
            "size": lambda: ramp.sum() > 70,
            "written": lambda: ramp.sum() > -5,
        }[self.kind]
        return x * self.weight if question() else x


class SkipsFullMasks(nn.Module):
    """Skips a mask that masks nothing, where it may look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = not torch.compiler.is_compiling() and not isinstance(mask, torch._subclasses.FakeTensor)
        return self.linear(x) if seen and bool(mask.all()) else self.linear(x * mask.unsqueeze(-1))


class Noisy(nn.Module):
    """Draws as many numbers as it is given, from a generator if it has one."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn((x.shape[0], 4), generator=self.generator, dtype=x.dtype)


def test_a_draw_from_no_generator_has_dynamic_sizes() -> None:
    program, model = capture(Noisy(), (torch.zeros(3, 4),)), Noisy()
    x = torch.zeros(7, 4)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(program.module(x), expected)


def test_a_mask_that_is_an_input_keeps_its_meaning() -> None:
    model = SkipsFullMasks()
    x, ones = torch.randn(2, 6, 4), torch.ones(2, 6)
    program = capture(model, (x, ones))
    padded = ones.clone()
    padded[1, 3:] = 0
    for mask in (ones, padded):
        assert torch.equal(program.module(x, mask), model(x, mask))


def test_a_branch_that_follows_from_sizes_is_taken() -> None:
    model = Packed()
    program = capture(model, (torch.randn(2, 6, 4),))
    assert not [n for n in program.graph.nodes if n.op == "call_function"], "the code of the branch is left"
    for length in (2, 6, 31):
        x = torch.randn(3, length, 4)
        assert torch.equal(program.module(x), model(x))


@pytest.mark.parametrize("kind", ["input", "parameter", "random", "drawn", "bernoulli", "written"])
def test_other_branches_are_refused(kind: str) -> None:
    with pytest.raises(RewriteError, match="data-dependent"):
        capture(Branches(kind), (torch.randn(2, 12, 4),))


def test_a_branch_on_the_length_holds_for_that_length_alone() -> None:
    model = Branches("size")
    program = capture(model, (torch.randn(2, 12, 4),))
    x = torch.randn(5, 12, 4)
    assert torch.equal(program.module(x), model(x))
    with pytest.raises(ValueError, match=r"where the capture fixed \[\*, 12, 4\]"):
        program.module(torch.randn(2, 20, 4))


def test_code_sees_an_eager_run_and_torch_itself_the_trace() -> None:
    model = LooksAtTheTrace()
    program = capture(model, (torch.randn(2, 4),))
    assert [n.op for n in program.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch._subclasses.FakeTensor is FakeTensor
    assert "__getattr__" not in vars(torch._subclasses)
    with pytest.raises(AttributeError, match="nothing"):
        _ = torch._subclasses.nothing
