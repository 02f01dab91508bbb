"""`torch.vmap` is seen through: its inner steps become operators on batches; other transforms of functions are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from rewrite import RewriteError, capture
from tests.compare import differences, observe


class Masked(nn.Module):
    """Attention whose mask is a function of two indices, a buffer and a constant, mapped over each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("most", torch.tensor(3))

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        length = torch.arange(x.shape[1])
        mapped = torch.vmap(torch.vmap(self.near, (None, 0)), (0, None))
        y = self.linear(x)
        return nn.functional.scaled_dot_product_attention(y, y, y, mapped(length, length) & ~padded[:, None])

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < self.most + torch.tensor(2))


class Products(nn.Module):
    """A product a sample, with gradients through it, and a second vmap after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        once = torch.vmap(torch.dot)(y, x)
        return torch.vmap(torch.mul)(y, once[:, None])


class Indexed(nn.Module):
    """Two masks that read data at mapped indices; the second export step reads the function that the first one made."""

    def forward(self, x: Tensor, padded: Tensor) -> tuple[Tensor, Tensor]:
        def kept(sample: Tensor, key: Tensor) -> Tensor:
            return ~padded[sample, key]

        with TransformGetItemToIndex():
            samples, keys = torch.arange(x.shape[0]), torch.arange(x.shape[1])
            masks = [torch.vmap(torch.vmap(kept, (None, 0)), (0, None))(samples, keys) for _ in range(2)]
        return x * masks[0][..., None], x + masks[1][..., None]


class Derived(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (x,), (x,))[1]


@pytest.mark.parametrize("kind", [Masked, Indexed])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_masks_by_index(kind: type[nn.Module], train: bool) -> None:
    torch.manual_seed(0)
    model = kind()
    program = capture(model, (torch.randn(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool)))
    padded = torch.zeros(3, 9, dtype=torch.bool)
    padded[1, 5:] = True
    x = torch.randn(3, 9, 4)
    assert (
        differences(observe(model, (x, padded), {}, train=train), observe(program.module, (x, padded), {}, train=train))
        == []
    )


def test_products_and_their_gradients() -> None:
    model = Products()
    program = capture(model, (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert torch.allclose(program.module(x), model(x))
    found, expected = (torch.autograd.grad(m(x).sum(), m.weight)[0] for m in (program.module, model))
    assert torch.allclose(found, expected)


def test_a_transform_that_is_no_vmap_is_refused_with_its_line() -> None:
    wanted = r"transform of functions.*\(at .*test_vmaps\.py:\d+: return torch\.func\.jvp"
    try:
        torch.export.export(Derived(), (torch.randn(2, 5),))
    except AssertionError:  # torch 2.11 fails at the steps itself, and names no line
        wanted = "torch.export cannot capture Derived"
    with pytest.raises(RewriteError, match=wanted):
        capture(Derived(), (torch.randn(2, 5),))
