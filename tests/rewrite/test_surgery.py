"""transform: the user's own class with the passes in it, or the reason why it cannot be had."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import rewrite
from rewrite import RewriteError
from rewrite.passes.normalization.dyt import DynamicTanh


class Block(nn.Module):
    """A norm, a linear layer, and a norm that is a call inside the code."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.inner = nn.LayerNorm(8), nn.Linear(8, 8), inner

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = scale * self.linear(self.norm(x))
        return nn.functional.layer_norm(y, (8,)) if self.inner else y


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_the_users_class_comes_back_and_the_model_stays(x: Tensor) -> None:
    model = Block().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = rewrite.transform(model, "dyt{alpha=0.7}", args=(x,))
    assert type(made) is Block
    assert torch.allclose(made(x), made.linear(torch.tanh(0.7 * x)))
    assert type(model.norm) is nn.LayerNorm
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert made.training is model.training


def test_keywords_and_a_list_of_passes(x: Tensor) -> None:
    made = rewrite.transform(Block(), [rewrite.get_pass("dyt")(alpha=0.2)], kwargs={"x": x, "scale": 2.0}, seed=3)
    assert isinstance(made.norm, DynamicTanh)
    assert made.norm.alpha.item() == pytest.approx(0.2)


def test_without_inputs_they_are_inferred_where_the_model_tells_them() -> None:
    model = Block()
    model.example_inputs = torch.randn(4, 8)
    made = rewrite.transform(model, "dyt", verify=False)
    assert isinstance(made.norm, DynamicTanh)
    with pytest.raises(RewriteError, match=r"no example inputs for Block: .*in Python: args=\(x,\)"):
        rewrite.transform(Block(), "dyt")


def test_what_cannot_be_put_into_the_class_is_an_error_with_the_way_out(x: Tensor) -> None:
    with pytest.raises(
        RewriteError, match=r"layer_norm is no module of your model .*the passes themselves hold: rewrite\.apply"
    ):
        rewrite.transform(Block(inner=True), "dyt", args=(x,))
    made = rewrite.transform(Block(inner=True), "dyt{where=norm}", args=(x,))
    assert isinstance(made.norm, DynamicTanh)


def test_a_pass_that_changes_nothing_says_so(x: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"^pass dyt changed nothing: no layer of it is a LayerNorm or RMSNorm$"):
        rewrite.transform(nn.Sequential(nn.Linear(8, 8)), "dyt", args=(x,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rewrite.transform(Block(), "dyt", args=(x,), verify=False)


def test_what_is_no_model_of_the_users_is_refused(x: Tensor) -> None:
    program = rewrite.capture(Block(), (x,))
    for wrong, kind in ((program, "Program"), (program.module, "program's module"), ("vit", "str")):
        with pytest.raises(RewriteError, match=f"transform takes your own nn.Module, not a {kind}"):
            rewrite.transform(wrong, "dyt", args=(x,))  # type: ignore[arg-type]


def test_a_mistake_in_the_text_is_the_pipelines_error(x: Tensor) -> None:
    with pytest.raises(RewriteError, match="did you mean 'dyt'"):
        rewrite.transform(Block(), "dyd", args=(x,))
