"""The user's own class back, and what cannot be put into it, by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError
from tests.models.stress import stress_cases

CASES = {c.name: c for c in stress_cases()}


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.fc(x)))


def converted(model: nn.Module) -> rewrite.Program:
    return rewrite.apply(model, "dyt", args=(torch.randn(4, 8),))


def test_it_is_the_users_class_and_computes_what_the_program_does() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    program = converted(model)
    made = rewrite.graft(program, model)
    x = torch.randn(3, 8)
    assert type(made) is Net
    assert type(made.norm).__name__ == "DynamicTanh"
    assert torch.equal(made.eval()(x), program.module.eval()(x))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert isinstance(model.norm, nn.LayerNorm)


def test_another_instance_takes_the_programs_weights() -> None:
    program = converted(Net())
    made = rewrite.graft(program, Net())
    assert torch.equal(made.fc.weight, program.module.fc.weight)


def test_another_width_or_class_is_refused_by_name() -> None:
    program = converted(Net())
    with pytest.raises(RewriteError, match=r"fc\.weight has shape"):
        rewrite.graft(program, Net(16))
    with pytest.raises(RewriteError, match="captured from"):
        rewrite.graft(program, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("name", "reason"), [("FunctionalLayerNorm", "is no module of your model"), ("HookedLayers", "does more than the layer")]
)
def test_what_is_no_whole_module_is_refused_by_name(name: str, reason: str) -> None:
    case = CASES[name]
    model = case.build()
    program = rewrite.apply(rewrite.capture(model, *case.inputs(2, 12)), "dyt", verify=False)
    with pytest.raises(RewriteError, match=reason):
        rewrite.graft(program, model)


class NormAct(nn.LayerNorm):
    """A norm with its activation, a spelling of timm's; the first dropout is never called."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.unused = nn.Identity()
        self.drop = nn.Dropout(0.2)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)))


def test_a_norm_with_an_activation_becomes_a_sequence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), NormAct(8))
    program = converted(model)
    made = rewrite.graft(program, model)
    assert [type(m).__name__ for m in made[1]] == ["DynamicTanh", "Dropout", "PReLU"]
    torch.save(made, tmp_path / "made.pt")
    again = torch.load(tmp_path / "made.pt", weights_only=False)
    x = torch.randn(3, 8)
    assert torch.equal(again.eval()(x), program.module.eval()(x))


class NormActAct(NormAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_child_that_is_called_twice_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), NormActAct(8))
    with pytest.raises(RewriteError, match="1 is a NormActAct, which does more"):
        rewrite.graft(converted(model), model)


def test_a_class_that_reads_what_the_new_layer_lacks_is_refused() -> None:
    """nn.TransformerEncoderLayer looks at the weights of its norms before it runs."""
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), torch.randn(2, 5, 8)
    with pytest.raises(RewriteError, match="your class does not run with the new layers at norm1, norm2: AttributeError"):
        rewrite.graft(rewrite.apply(model, "fold-affine", args=(x,)), model)
