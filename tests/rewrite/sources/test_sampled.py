"""Example inputs of a model that data is given for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError
from rewrite.sources.data import Data
from rewrite.sources.sampled import inputs_for
from tests.models import zoo

IDS = torch.randint(100, (64, 12))


class Own(nn.Module):
    """A model that does not say what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


def test_optional_inputs_that_the_data_lacks_are_left_out() -> None:
    model = zoo.transformers_case("gpt2").build()
    assert set(inputs_for(model, None)[1]) == {"input_ids", "attention_mask"}
    assert set(inputs_for(model, Data.of({"input_ids": IDS}))[1]) == {"input_ids"}
    assert set(inputs_for(model, Data.of(IDS))[1]) == {"input_ids"}, "without a name it is the first argument"
    assert set(inputs_for(model, Data.of({"input_ids": IDS, "attention_mask": IDS}))[1]) == {"input_ids", "attention_mask"}


def test_data_tells_the_inputs_of_a_model_that_does_not() -> None:
    args, kwargs = inputs_for(Own(), Data.of([{"x": torch.randn(8, 4), "labels": torch.zeros(8)}]))
    assert args == ()
    assert kwargs["x"].shape == (8, 4)
    assert set(kwargs) == {"x"}
    assert inputs_for(Own(), Data.of(torch.randn(64, 4)))[0][0].shape == (2, 4)


def test_without_data_it_is_refused_as_before() -> None:
    with pytest.raises(RewriteError, match="does not say what it takes"):
        inputs_for(Own(), None)
    with pytest.raises(RewriteError, match="the data is empty"):
        inputs_for(Own(), Data.of([]))


class Images(nn.Module):
    """Takes images of any size, and says a size of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 224, 224)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def test_images_have_the_size_that_they_have_in_the_data() -> None:
    assert inputs_for(Images(), None)[0][0].shape == (2, 3, 224, 224)
    (x,), _ = inputs_for(Images(), Data.of(torch.randn(8, 3, 40, 40)))
    assert x.shape == (2, 3, 40, 40)
