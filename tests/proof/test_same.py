"""The promise SAME: what breaks it is stopped by a named check, and each kind of mistake has a right twin that passes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from rewrite import Program, VerificationError, apply
from rewrite.graph.nodes import aten
from rewrite.pipeline.context import Context

from . import models
from .steps import Act, Action, Cut, Like, acting, replacing, step

program = functools.cache(models.program)
TANH = functools.partial(F.gelu, approximate="tanh")


def only(condition: bool, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return other if condition else value


def set_weight(path: str, change: float) -> Action:
    def action(program: Program, context: Context) -> None:
        context.edit.set_parameter(path, lambda weight: weight * change, path)

    return action


def _frozen(old: nn.Linear) -> nn.Linear:
    made = nn.Linear(old.in_features, old.out_features)
    made.weight, made.bias = nn.Parameter(old.weight.detach().clone(), requires_grad=False), old.bias
    return made


class Renamed(nn.Module):
    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.kernel, self.bias = old.weight, old.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.kernel, self.bias)


def _buffered(old: nn.Linear) -> nn.Module:
    made = Like(old, lambda layer: layer.baked)
    del made.weight
    return made


def scaled_pair(inner: float, outer: float, *, mapped: bool = True) -> Action:
    """W1 of a pair (value path) times ``inner``, the next weight times ``outer``: the same if their product is 1."""

    def action(program: Program, context: Context) -> None:
        for path, factor in (
            ("blocks.0.norm.weight", inner),
            ("blocks.0.norm.bias", inner),
            ("blocks.0.first.weight", outer),
        ):
            value = program.module.get_parameter(path)
            if mapped:
                context.edit.set_parameter(path, functools.partial(torch.mul, torch.tensor(factor)), path)
            else:
                context.edit.set_parameter(path, value * factor)

    return action


def without_norm_affine(program: Program, context: Context) -> None:
    """The norm's weight and bias go into the linear that reads it, each as a map."""
    edit = context.edit
    edit.set_parameter(
        "blocks.0.first.bias",
        lambda b, w, s: b + w @ s,
        "blocks.0.first.bias",
        "blocks.0.first.weight",
        "blocks.0.norm.bias",
    )
    edit.set_parameter("blocks.0.first.weight", lambda w, g: w * g, "blocks.0.first.weight", "blocks.0.norm.weight")
    edit.replace_layer("blocks.0.norm", nn.LayerNorm(models.DIM, elementwise_affine=False))


def wrong_order(program: Program, context: Context) -> None:
    """As above, but the bias is made from the weight that is folded already."""
    edit = context.edit
    edit.set_parameter("blocks.0.first.weight", lambda w, g: w * g, "blocks.0.first.weight", "blocks.0.norm.weight")
    edit.set_parameter(
        "blocks.0.first.bias",
        lambda b, w, s: b + w @ s,
        "blocks.0.first.bias",
        "blocks.0.first.weight",
        "blocks.0.norm.bias",
    )
    edit.replace_layer("blocks.0.norm", nn.LayerNorm(models.DIM, elementwise_affine=False))


def dropout_gone(program: Program, context: Context) -> None:
    node = next(n for n in program.graph.nodes if n.target == "blocks.0.dropout")
    context.edit.rewire(node, node.args[0])
    context.edit.remove(node)


def doubled_negation(program: Program, context: Context) -> None:
    node = next(n for n in program.graph.nodes if n.target == "blocks.0.act")
    first = context.edit.insert_function(aten.neg.default, (node,), after=node)
    second = context.edit.insert_function(aten.neg.default, (first,), after=first)
    context.edit.rewire(node, second, lambda user: user is not first)


def single_negation(program: Program, context: Context) -> None:
    node = next(n for n in program.graph.nodes if n.target == "blocks.0.act")
    made = context.edit.insert_function(aten.neg.default, (node,), after=node)
    context.edit.rewire(node, made, lambda user: user is not made)


def branch_rewired(program: Program, context: Context) -> None:
    """The second block's norm reads the embedding instead of the first block's sum."""
    norms = [n for n in program.graph.nodes if n.op == "call_module" and str(n.target).endswith("norm")]
    context.edit.rewire(norms[1].args[0], norms[0].args[0], lambda user: user is norms[1])


def hook(program: Program, context: Context) -> None:
    program.module.get_submodule("blocks.0.first").register_forward_hook(lambda layer, inputs, output: 1.01 * output)


def attribute(program: Program, context: Context) -> None:
    program.module.get_submodule("blocks.0.norm").eps = 1e-3


def momentum(program: Program, context: Context) -> None:
    context.edit.set_attribute("batch_norm", "momentum", 0.2)


def buffer(program: Program, context: Context) -> None:
    program.module.scale = torch.full((1,), 0.51)


def gelu_by_hand(x: torch.Tensor, y: torch.Tensor, layer: Act) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


WRONG: dict[str, tuple[Action, str]] = {
    "another function": (acting(lambda x, y, layer: TANH(x)), "same"),
    "off by one part in ten million": (acting(lambda x, y, layer: y * (1 + 1e-7)), "same"),
    "a tail that is cut": (acting(lambda x, y, layer: torch.where(x < -5, 0.0, y)), "same"),
    "large values clipped": (acting(lambda x, y, layer: y.clamp(max=20)), "same"),
    "no gradient": (acting(lambda x, y, layer: y.detach()), "same"),
    "a gradient scaled": (acting(lambda x, y, layer: Cut.apply(y, 1.001)), "same"),
    "a gradient with another sign": (acting(lambda x, y, layer: Cut.apply(y, -1.0)), "same"),
    "half precision inside": (acting(lambda x, y, layer: F.gelu(x.half()).to(x.dtype)), "same"),
    "another function in bfloat16": (acting(lambda x, y, layer: only(x.dtype is torch.bfloat16, y, x)), "same"),
    "another function in float32": (acting(lambda x, y, layer: only(x.dtype is torch.float32, y, x)), "same"),
    "another function under autocast": (
        acting(lambda x, y, layer: only(torch.is_autocast_enabled("cpu"), y, x)),
        "same",
    ),
    "another function without gradients": (
        acting(lambda x, y, layer: only(not torch.is_grad_enabled(), y, TANH(x))),
        "same",
    ),
    "another function in training": (acting(lambda x, y, layer: only(layer.training, y, TANH(x))), "same"),
    "another function in evaluation": (acting(lambda x, y, layer: only(not layer.training, y, TANH(x))), "same"),
    "another function from the third call on": (acting(lambda x, y, layer: only(layer.calls > 2, y, x)), "same"),
    "another function for a batch of one": (acting(lambda x, y, layer: only(len(x) == 1, y, x)), "same"),
    "another function at other lengths": (acting(lambda x, y, layer: only(x.shape[1] != 6, y, x)), "same"),
    "a dropout more": (acting(lambda x, y, layer: F.dropout(y, 0.1, layer.training)), "same"),
    "the input written to": (acting(lambda x, y, layer: (y + 0, x.detach().zero_())[0]), "same"),
    "noise": (acting(lambda x, y, layer: y + 1e-6 * torch.randn_like(y)), "same"),
    "a weight drawn anew at each run": (
        replacing("blocks.0.first", lambda old: nn.Linear(old.in_features, old.out_features)),
        "deterministic",
    ),
    "a weight baked": (replacing("blocks.0.first", lambda old: Like(old, lambda layer: layer.baked)), "same"),
    "a weight baked, its gradient kept": (
        replacing(
            "blocks.0.first", lambda old: Like(old, lambda layer: layer.baked + (layer.weight - layer.weight.detach()))
        ),
        "same",
    ),
    "a weight detached": (
        replacing("blocks.0.first", lambda old: Like(old, lambda layer: layer.weight.detach())),
        "same",
    ),
    "a weight changed": (set_weight("blocks.1.second.weight", 1 + 1e-6), "same"),
    "a bias changed": (set_weight("head.bias", 1 + 1e-6), "same"),
    "scales that do not cancel": (scaled_pair(2.0, 0.5001), "same"),
    "scales without a map": (scaled_pair(2.0, 0.5, mapped=False), "same"),
    "folding in the wrong order": (wrong_order, "same"),
    "another eps": (replacing("blocks.0.norm", lambda old: _norm(old, 1e-4)), "same"),
    "dropout taken out": (dropout_gone, "same"),
    "another rate of dropout": (replacing("blocks.0.dropout", lambda old: nn.Dropout(0.2)), "same"),
    "a negation": (single_negation, "same"),
    "a branch that reads another value": (branch_rewired, "same"),
    "the batch norm's momentum": (momentum, "same"),
    "a hook": (hook, "frame"),
    "an attribute past the journal": (attribute, "frame"),
    "a buffer that is not saved": (buffer, "frame"),
    "a frozen weight": (replacing("blocks.0.first", _frozen), "same"),
    "a weight renamed": (replacing("blocks.0.first", Renamed), "same"),
    "a weight that became a buffer": (replacing("blocks.0.first", _buffered), "same"),
    "the padding word trained": (replacing("embed", lambda old: _embedding(old)), "same"),
}
RIGHT: dict[str, Action] = {
    "GELU by hand": acting(gelu_by_hand),
    "GELU of torch": acting(lambda x, y, layer: y),
    "a dropout of one's own": replacing("blocks.0.dropout", lambda old: _Dropout()),
    "a linear layer of one's own": replacing("blocks.0.first", lambda old: Like(old, lambda layer: layer.weight)),
    "scales that cancel": scaled_pair(2.0, 0.5),
    "a norm's affine folded": without_norm_affine,
    "negated twice": doubled_negation,
    "the same norm anew": replacing("blocks.0.norm", lambda old: _norm(old, old.eps)),
    "nothing": lambda program, context: None,
}


def _embedding(old: nn.Embedding) -> nn.Embedding:
    made = nn.Embedding(old.num_embeddings, old.embedding_dim)
    made.weight = old.weight
    return made


class _Dropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.25, self.training)


def _norm(old: nn.LayerNorm, eps: float) -> nn.LayerNorm:
    made = nn.LayerNorm(models.DIM, eps)
    made.weight, made.bias = old.weight, old.bias
    return made


@pytest.mark.parametrize("name", WRONG)
def test_what_breaks_the_promise_is_stopped_by_name(name: str, tmp_path: Path) -> None:
    action, check = WRONG[name]
    with pytest.raises(VerificationError) as info:
        apply(program(), step(action), crash_folder=tmp_path)
    assert f": {check}" in str(info.value)


@pytest.mark.parametrize("name", RIGHT)
def test_right_twins_pass(name: str, tmp_path: Path) -> None:
    record = apply(program(), step(RIGHT[name]), crash_folder=tmp_path).history[0]
    assert record.verification is not None
    assert record.verification.passed
