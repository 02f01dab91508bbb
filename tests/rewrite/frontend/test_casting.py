"""A program is moved and cast as its model is: bfloat16, float64, autocast, meta."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewrite import Program, capture
from rewrite.numerics.compare import clone
from tests.compare import CAPTURED, OTHER, Observed, captured, case, differences, model_of, observe
from tests.models import stress, zoo

DEVELOPMENT = [c.name for c in zoo.development_cases()]
FIXED = {"Recurrent", "Variadic", "IntOfShape", "LoopOverLength"}
UNTRAINED = {"LayerDrop", "DataDependentBranch"}
STRESS = [c.name for c in stress.stress_cases() if c.name not in UNTRAINED]

#: A value that is cast twice has two gradients to add: in the program in another order than in the model.
OTHER_ORDER = {"RMSNormSpellings"}


def inputs_of(name: str, dtype: torch.dtype | None = None) -> tuple[Any, dict[str, Any]]:
    args, kwargs = case(name).inputs(*(CAPTURED if name in FIXED else OTHER))
    if dtype is None:
        return args, kwargs
    cast: tuple[Any, dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs)
    )
    return cast


def pair(
    name: str,
    change: Callable[[nn.Module], nn.Module],
    train: bool,
    dtype: torch.dtype | None,
    context: Callable[[], Any] = contextlib.nullcontext,
) -> tuple[Observed, Observed]:
    """The changed model and the changed program, observed on the same inputs."""
    module, model = change(captured(name).clone().module), change(clone(model_of(name)))
    args, kwargs = inputs_of(name, dtype)
    open_cache = (
        {"use_cache": False} if "use_cache" in model.forward.__code__.co_varnames or name in ("gpt2", "llama", "t5") else {}
    )
    with context():
        try:
            expected = observe(model, args, {**kwargs, **open_cache}, train=train)
        except RuntimeError as error:
            if "could not create a primitive" in str(error):  # oneDNN's LSTM in bfloat16, without AVX-512
                pytest.skip(f"this CPU does not run the model itself so: {error}")
            raise
        return expected, observe(module, args, kwargs, train=train)


MODES = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


@MODES
@pytest.mark.parametrize("name", [*DEVELOPMENT, *[n for n in STRESS if n not in stress.FLOAT32_ONLY | OTHER_ORDER]])
def test_bfloat16_is_the_models_bit_for_bit(name: str, train: bool) -> None:
    model, module = pair(name, lambda m: m.to(torch.bfloat16), train, torch.bfloat16)
    assert differences(model, module) == []


@MODES
@pytest.mark.parametrize("name", [*DEVELOPMENT, *[n for n in STRESS if n not in OTHER_ORDER | {"AutocastOff"}]])
def test_float64_is_the_models_bit_for_bit(name: str, train: bool) -> None:
    model, module = pair(name, lambda m: m.double(), train, torch.float64)
    assert differences(model, module) == []


@MODES
@pytest.mark.parametrize("name", [*DEVELOPMENT, *STRESS])
def test_autocast_is_the_models_bit_for_bit(name: str, train: bool) -> None:
    model, module = pair(name, lambda m: m, train, None, lambda: torch.autocast("cpu", torch.bfloat16))
    assert differences(model, module) == []


@pytest.mark.parametrize("name", sorted(OTHER_ORDER))
def test_bfloat16_in_another_order_is_no_further_from_float32(name: str) -> None:
    model, module = pair(name, lambda m: m.to(torch.bfloat16), True, torch.bfloat16)
    args, kwargs = inputs_of(name)
    truth = observe(model_of(name), args, kwargs, train=True)
    for kind in ("outputs", "gradients"):
        theirs, ours, right = (_flat(getattr(o, kind)) for o in (model, module, truth))
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm(), kind


def _flat(values: Any) -> torch.Tensor:
    given = values.values() if isinstance(values, dict) else values
    return torch.cat([t.double().flatten() for t in given if t is not None])


@pytest.mark.parametrize("name", ["llama", "DtypeLiterals", "RMSNormSpellings"])
def test_float64_of_dtype_literals(name: str) -> None:
    module = captured(name).clone().module.double()
    args, kwargs = inputs_of(name, torch.float64)
    outputs = observe(module, args, kwargs, train=False).outputs
    assert outputs[0].dtype is torch.float64


@pytest.mark.parametrize(
    "name",
    [
        *DEVELOPMENT,
        "RMSNormSpellings",
        "SpectralNormParametrized",
        "ConstantAttribute",
        "NonPersistentBuffer",
        "DeviceLiterals",
        "DtypeLiterals",
    ],
)
def test_meta_device(name: str) -> None:
    module = captured(name).clone().module.to("meta")
    assert all(t.is_meta for t in [*module.parameters(), *module.buffers()])
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), inputs_of(name))
    expected = captured(name).clone().module.eval()(*inputs_of(name)[0], **inputs_of(name)[1])
    got = module.eval()(*args, **kwargs)
    for a, b in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        assert b.is_meta
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_dtype_that_stays_stays_and_that_follows_follows() -> None:
    module = captured("DtypeLiterals").clone().module.to(torch.bfloat16)
    (x,), _ = inputs_of("DtypeLiterals", torch.bfloat16)
    kept: list[torch.dtype] = []
    softmax = torch.ops.aten.softmax.int

    class Spy(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().call_function(target, args, kwargs)
            if target is softmax:
                kept.append(value.dtype)
            return value

    result = Spy(module, graph=module.graph).run(x)
    assert kept == [torch.float32]
    assert pytree.tree_leaves(result)[0].dtype is torch.bfloat16


def test_model_captured_in_bfloat16() -> None:
    model = model_of("RMSNormSpellings").to(torch.bfloat16)
    args, kwargs = case("RMSNormSpellings").inputs(*OTHER)
    args = tuple(a.to(torch.bfloat16) for a in args)
    program: Program = capture(copy.deepcopy(model), args, kwargs)
    for dtype in (torch.bfloat16, torch.float32):
        cast = tuple(a.to(dtype) for a in args)
        a = observe(copy.deepcopy(model).to(dtype), cast, {}, train=True)
        b = observe(program.clone().module.to(dtype), cast, {}, train=True)
        assert all(torch.equal(x, y) for x, y in zip(a.outputs, b.outputs, strict=True))


class OtherwiseInEvaluation(nn.Module):
    """Operators of one mode alone that name the model's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if self.training else torch.softmax(y, -1, dtype=y.dtype) + torch.arange(y.shape[-1], dtype=y.dtype)


@pytest.mark.parametrize("train", [False, True])
def test_dtypes_follow_where_evaluation_has_operators_of_its_own(train: bool) -> None:
    model, x = OtherwiseInEvaluation(), torch.randn(2, 4)
    moved = capture(model, (x,)).module.double()
    a, b = (observe(m, (x.double(),), {}, train=train) for m in (model.double(), moved))
    assert differences(a, b) == []
