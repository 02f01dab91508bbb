"""Rules of norms, convolutions and what works on the places of an image."""

from __future__ import annotations

from typing import Any

from .call import Axes, Call
from .dims import Dim
from .operators import roles, rule


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: Call) -> Any:
    own = call.axes("input")
    shape = call.named["normalized_shape"]
    for place, dim in enumerate(own[-len(shape) :]):
        dim.use("norm")
        call.literal("normalized_shape", place, dim)
        for name in ("weight", "bias"):
            if call.has(name):
                call.unify(dim, call.axes(name)[place])
                roles(call, name, {place: "added" if name == "bias" else "elementwise"})
    if call.gives_several:
        return [own, *([*own[: -len(shape)], *[Dim(1) for _ in shape]] for _ in call.all_sizes[1:])]
    return own


@rule("batch_norm", "_native_batch_norm_legit", "native_batch_norm", "instance_norm", "cudnn_batch_norm")
def _batch_norm(call: Call) -> Any:
    own = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unify(own[1], call.axes(name)[0])
            roles(call, name, {0: "elementwise" if name in ("weight", "running_var") else "added"})
    if call.named.get("training", call.named.get("use_input_stats")):
        for i, dim in enumerate(own):
            if i != 1:
                dim.use("norm")
    return [own, *([own[1]] for _ in call.all_sizes[1:])] if call.gives_several else own


@rule("group_norm", "native_group_norm")
def _group_norm(call: Call) -> Any:
    own = call.axes("input")
    groups, within = call.split(own[1], int(call.named.get("num_groups", call.named.get("group", 1))))
    within.use("norm")
    call.literal("num_groups" if "num_groups" in call.named else "group", None, groups)
    for name in ("weight", "bias"):
        if call.has(name):
            call.unify(own[1], call.axes(name)[0])
            roles(call, name, {0: "added" if name == "bias" else "elementwise"})
    return own


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def _convolution(call: Call) -> Axes:
    if call.named.get("transposed"):
        return list(call.unruled("a transposed convolution"))
    weight = call.axes("weight")
    found = convolved(call, call.axes("input"), weight, call.number("groups") or 1)
    roles(call, "weight", {0: "out", 1: "in"})
    if (call.number("groups") or 1) > 1:
        call.literal("groups", None, call.split(weight[0], call.number("groups") or 1)[0])
    if call.has("bias"):
        call.unify(weight[0], call.axes("bias")[0])
        roles(call, "bias", {0: "out"})
    return found


def convolved(call: Call, own: Axes, weight: Axes, groups: int) -> Axes:
    """A convolution: channels in and out, groups of them side by side; the places are rigid where they change."""
    channel = len(own) - len(weight) + 1
    if groups == 1:
        call.unify(own[channel], weight[1])
        own[channel].use("in")
    else:
        sides, within = call.split(own[channel], groups)
        call.unify(within, weight[1])
        within.use("in" if within.size > 1 else "elementwise")
        call.unify(call.split(weight[0], groups)[0], sides)
        sides.use("group")
    for dim in weight[2:]:
        dim.freeze("the size of a kernel")
    places = []
    for dim, kernel, size in zip(own[channel + 1 :], weight[2:], call.sizes[channel + 1 :], strict=True):
        if kernel.size > 1 or dim.size != size:
            call.freeze([dim], "the order of its entries counts")
        places.append(dim if dim.size == size else call.rigid(size, "places of a convolution"))
    return [*own[:channel], weight[0], *places]


def placed(call: Call) -> Any:
    """What works on the places of an image and keeps batch and channels: pooling, interpolation."""
    own = call.axes(call.node.args[0])
    found = []
    for i, (dim, size) in enumerate(zip(own, call.sizes, strict=True)):
        if dim.size == size:
            if len(own) - i <= len(own) - 2:
                call.freeze([dim], "the order of its entries counts")
            found.append(dim)
        else:
            call.freeze([dim], "its places are pooled")
            found.append(call.rigid(size, "places of an image"))
    return [found for _ in call.all_sizes] if call.gives_several else found


_PLACED = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool2d max_pool2d_with_indices upsample_bilinear2d upsample_nearest2d upsample_bicubic2d upsample_linear1d
upsample_nearest1d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
"""
rule(*_PLACED.split())(placed)


@rule("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Axes:
    own = call.axes("self")
    kept, times = call.split(own[-3], call.sizes[-3])
    call.freeze([times, *own[-2:]], "pixels are shuffled")
    return [*own[:-3], kept, *(call.rigid(s, "pixels are shuffled") for s in call.sizes[-2:])]
