"""How each ATen operator treats the dimensions of its arguments: a table of rules, which third parties may extend.

A rule is given a ``Call`` and returns the dimensions of the value (a list of them for each part where there are several).
Operators that work element by element need none: their schema tells. An operator without a rule makes its axes rigid.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from rewrite.graph.nodes import aten, overload, packet

from .call import Axes, Call
from .dims import Dim, concatenated, product

Rule = Callable[[Call], Any]
RULES: dict[Any, Rule] = {}
"""By overload packet, such as ``torch.ops.aten.cat``."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by their names."""

    def register(function: Rule) -> Rule:
        for name in names:
            if hasattr(aten, name):
                RULES[getattr(aten, name)] = function
        return function

    return register


def by_operator(call: Call) -> Any:
    """The dimensions of what an operator gives."""
    if call.node.target is operator.getitem:
        found = call.known.get(call.node.args[0])  # type: ignore[arg-type]
        place = call.node.args[1]
        fits = isinstance(found, list | tuple) and isinstance(place, int) and place < len(found)
        return found[place] if fits else call.unruled("getitem")
    found = RULES.get(packet(call.node))
    if found is not None:
        return found(call)
    if not call.all_sizes:
        return None  # a number
    if _is_elementwise(call.node):
        return elementwise(call)
    return call.unruled(str(packet(call.node) or call.node.target))


_ELEMENTWISE = """
__and__ __or__ __xor__ logical_and logical_or logical_xor logical_not floor_divide
clone contiguous detach alias to _to_copy type_as dropout dropout_ native_dropout lift_fresh_copy where masked_fill
masked_fill_ copy_ copy fill_ zero_ zeros_like ones_like empty_like full_like rand_like randn_like bernoulli bernoulli_
nan_to_num lerp view_as_real conj resolve_conj resolve_neg expand_as cumsum cumprod logcumsumexp feature_dropout
requires_grad_ detach_ normal_ uniform_ hardtanh softplus isnan isinf isfinite real imag
"""


def _is_elementwise(node: Node) -> bool:
    found = overload(node)
    if found is None:
        return False
    return torch.Tag.pointwise in found.tags or packet(node).__name__ in _ELEMENTWISE.split()


def elementwise(call: Call) -> Any:
    """Every axis is one with those that it is broadcast against."""
    given = [axes for _, axes in call.tensors()]
    found = call.broadcast(given, call.sizes)
    for node, axes in call.tensors():
        tensor = call.tensor_of(node)
        if tensor is not None:
            for axis in range(len(axes)):
                call.role(tensor, axis, "elementwise")
    parts = [found if sizes == call.sizes else call.broadcast(given, sizes) for sizes in call.all_sizes]
    return parts if isinstance(call.node.meta.get("val"), list | tuple) else found


# ---- moves -------------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy")
def _view(call: Call) -> Axes:
    found = call.reshaped(call.axes("self"), call.sizes)
    name = "size" if "size" in call.named else "shape"
    for place, dim in enumerate(found):
        call.literal(name, place, dim)
    return found


@rule("flatten", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "ravel", "view_as")
def _refolded(call: Call) -> Axes:
    return call.reshaped(call.axes(call.node.args[0]), call.sizes)


@rule("unflatten")
def _unflatten(call: Call) -> Axes:
    found = call.reshaped(call.axes("self"), call.sizes)
    start = int(call.named["dim"]) % len(call.axes("self"))
    for place in range(len(call.named["sizes"])):
        call.literal("sizes", place, found[start + place])
    return found


@rule("transpose", "transpose_", "swapaxes")
def _transpose(call: Call) -> Axes:
    found = call.axes("self")
    a, b = (int(call.named[n]) % len(found) for n in ("dim0", "dim1"))
    found[a], found[b] = found[b], found[a]
    return found


@rule("t", "numpy_T", "mT", "adjoint")
def _t(call: Call) -> Axes:
    found = call.axes("self")
    return [*found[:-2], *reversed(found[-2:])]


@rule("permute")
def _permute(call: Call) -> Axes:
    found = call.axes("self")
    return [found[int(d) % len(found)] for d in call.named["dims"]]


@rule("movedim", "moveaxis")
def _movedim(call: Call) -> Axes:
    found = call.axes("self")
    pairs = [call.named["source"], call.named["destination"]]
    source, destination = ([int(d) % len(found) for d in (p if isinstance(p, list | tuple) else [p])] for p in pairs)
    rest = [d for i, d in enumerate(found) if i not in source]
    for place, origin in sorted(zip(destination, source, strict=True)):
        rest.insert(place, found[origin])
    return rest


@rule("expand", "broadcast_to")
def _expand(call: Call) -> Axes:
    own = call.axes("self")
    padded: list[Dim | None] = [*[None] * (len(call.sizes) - len(own)), *own]
    found: Axes = []
    for place, (dim, size) in enumerate(zip(padded, call.sizes, strict=True)):
        kept = dim is not None and dim.size == size
        made = dim if kept and dim is not None else Dim(size)
        found.append(made)
        call.literal("size", place, made)
    return found


@rule("repeat")
def _repeat(call: Call) -> Axes:
    own, times = call.axes("self"), call.named["repeats"]
    padded = [*[Dim(1) for _ in range(len(times) - len(own))], *own]
    found = []
    for dim, count, size in zip(padded, times, call.sizes, strict=True):
        copies = size // dim.size if dim.size else 1
        found.append(dim if count == 1 else product([call.rigid(copies, "copies of a tensor"), dim]))
    return found


@rule("repeat_interleave")
def _repeat_interleave(call: Call) -> Axes:
    own = call.axes("self")
    if not own or not isinstance(call.named.get("repeats"), int) or call.named.get("dim") is None:
        return list(call.unruled("repeat_interleave"))
    axis = int(call.named["dim"]) % len(own)
    copies = Dim(call.sizes[axis] // own[axis].size)
    call.literal("repeats", None, copies)
    own[axis] = product([own[axis], copies])
    call.literal("output_size", None, own[axis])
    return own


@rule("slice", "narrow")
def _slice(call: Call) -> Axes:
    own, axis = call.axes("self"), int(call.named["dim"] or 0) % max(len(call.axes("self")), 1)
    size = call.sizes[axis]
    if own[axis].size == size:
        return own
    start, step = call.named.get("start") or 0, call.named.get("step") or 1
    if not isinstance(start, int) or step != 1 or "a size of the input" in own[axis].root().rigid:
        call.freeze([own[axis]], "a part of it is taken by number")
        own[axis] = call.rigid(size, "a part that is taken by number")
        return own
    start = start % own[axis].size if start < 0 else start
    sizes = [s for s in (start, size, own[axis].size - start - size) if s]
    parts = call.cut(own[axis], sizes)
    before = parts[:1] if start else []
    if "length" in call.named:
        call.literal("start", None, concatenated(before) if before else Dim(0))
        call.literal("length", None, parts[len(before)])
    else:
        call.literal("start", None, concatenated(before) if before else Dim(0))
        ends_inside = start + size < own[axis].size
        call.literal("end", None, concatenated(parts[: len(before) + 1]) if ends_inside else own[axis])
        _freeze_negative(call, parts)
    own[axis] = parts[len(before)]
    return own


def _freeze_negative(call: Call, parts: Sequence[Dim]) -> None:
    """A start or end counted from the other end says another size than it seems to."""
    for name in ("start", "end"):
        value = call.named.get(name)
        if isinstance(value, int) and value < 0:
            call.freeze(parts, "a part of it is counted from its end")


@rule("select")
def _select(call: Call) -> Axes:
    own = call.axes("self")
    axis = int(call.named["dim"]) % len(own)
    call.freeze([own[axis]], "an entry of it is taken by number")
    return own[:axis] + own[axis + 1 :]


@rule("unbind")
def _unbind(call: Call) -> list[Axes]:
    own = call.axes("self")
    axis = int(call.named["dim"] or 0) % len(own)
    call.freeze([own[axis]], "its entries are taken apart")
    return [own[:axis] + own[axis + 1 :] for _ in call.all_sizes]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def _split(call: Call) -> list[Axes]:
    own = call.axes("self")
    axis = int(call.named["dim"] or 0) % len(own)
    parts = call.cut(own[axis], [sizes[axis] for sizes in call.all_sizes])
    name = next((n for n in ("split_sizes", "split_size", "sections") if n in call.named), "")
    given = call.named.get(name)
    if isinstance(given, list | tuple):
        for place, part in enumerate(parts):
            call.literal(name, place, part)
    else:  # parts of one size
        for part in parts[1:]:
            if part.size == parts[0].size:
                call.unify(parts[0], part)
            else:
                call.freeze([own[axis]], "it is taken apart into parts of one size and a rest")
        if name == "split_size":
            call.literal(name, None, parts[0])
    return [[*own[:axis], part, *own[axis + 1 :]] for part in parts]


@rule("cat", "concat", "concatenate")
def _cat(call: Call) -> Axes:
    given = [axes for node in call.named["tensors"] if (axes := call.axes(node)) and len(axes) == len(call.sizes)]
    if not given:
        return list(call.unruled("cat"))
    axis = int(call.named["dim"] or 0) % len(call.sizes)
    found = call.broadcast([[d for i, d in enumerate(axes) if i != axis] for axes in given], _without(call.sizes, axis))
    found.insert(axis, concatenated(axes[axis] for axes in given))
    return found


def _without(sizes: Sequence[int], axis: int) -> list[int]:
    return [size for i, size in enumerate(sizes) if i != axis]


@rule("stack")
def _stack(call: Call) -> Axes:
    given = [call.axes(node) for node in call.named["tensors"]]
    axis = int(call.named["dim"] or 0) % len(call.sizes)
    found = call.broadcast(given, _without(call.sizes, axis))
    found.insert(axis, call.rigid(call.sizes[axis], "tensors put beside each other"))
    return found


@rule("flip", "roll", "sort", "argsort", "tril", "triu", "tril_", "triu_", "rot90", "cummax", "cummin")
def _ordered(call: Call) -> Any:
    own, along = call.axes("self"), call.named.get("dims", call.named.get("dim"))
    if packet(call.node) in (aten.tril, aten.triu, aten.tril_, aten.triu_):
        along = [-1, -2]
    axes = along if isinstance(along, list | tuple) else range(len(own)) if along is None else [along]
    call.freeze([own[int(a)] for a in axes], "the order of its entries counts")
    return [own, own] if isinstance(call.node.meta.get("val"), list | tuple) else own


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(call: Call) -> Axes:
    found = []
    for dim, size in zip(call.axes("self"), call.sizes, strict=True):
        if dim.size != size:
            call.freeze([dim], "it is padded")
        found.append(dim if dim.size == size else call.rigid(size, "padded"))
    return found


# ---- sums and products -------------------------------------------------------------------------------------------


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "prod")
@rule("any", "all", "argmax", "argmin", "max", "min", "median", "nansum")
def _reduced(call: Call) -> Any:
    if call.has("other"):
        return elementwise(call)
    own, along = call.axes("self"), call.named.get("dim")
    axes = range(len(own)) if along is None or along == [] else along if isinstance(along, list | tuple) else [along]
    gone = {int(a) % max(len(own), 1) for a in axes}
    for axis in gone:
        own[axis].use("reduce")
    if call.named.get("keepdim"):
        found = [Dim(1) if i in gone else dim for i, dim in enumerate(own)]
    else:
        found = [dim for i, dim in enumerate(own) if i not in gone]
    return [list(found) for _ in call.all_sizes] if isinstance(call.node.meta.get("val"), list | tuple) else found


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "glu", "_safe_softmax")
def _softmax(call: Call) -> Axes:
    own = call.axes("self")
    axis = int(call.named["dim"]) % len(own)
    if call.sizes[axis] != own[axis].size:  # the halves of a gated unit
        first, second = call.cut(own[axis], [call.sizes[axis]] * 2)
        own[axis] = call.unify(first, second)
        return own
    own[axis].use("softmax")
    return own


@rule("linear")
def _linear(call: Call) -> Axes:
    own, weight = call.axes("input"), call.axes("weight")
    contract(call, own[-1], weight[1], call.named["input"], call.named["weight"])
    _roles(call, "weight", {0: "out", 1: "in"})
    if call.has("bias"):
        call.unify(weight[0], call.axes("bias")[0])
        _roles(call, "bias", {0: "out"})
    return [*own[:-1], weight[0]]


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(call: Call) -> Axes:
    names = ("self", "mat2") if "mat2" in call.named else ("self", "other")
    names = ("self", "vec") if "vec" in call.named else ("self", "tensor") if "tensor" in call.named else names
    return _multiplied(call, names)


@rule("addmm", "baddbmm")
def _addmm(call: Call) -> Axes:
    names = ("mat1", "mat2") if "mat1" in call.named else ("batch1", "batch2")
    found = _multiplied(call, names)
    _roles(call, "self", {-1: "out"})
    return call.broadcast([found, call.axes("self")], call.sizes)


def _multiplied(call: Call, names: tuple[str, str]) -> Axes:
    left, right = (call.axes(n) for n in names)
    inner = right[-2] if len(right) > 1 else right[-1]
    contract(call, left[-1], inner, *(call.named[n] for n in names))
    _roles(call, names[1], {-2: "in", -1: "out"} if len(right) > 1 else {-1: "in"})
    _roles(call, names[0], {-2: "out", -1: "in"} if len(left) > 1 else {-1: "in"})
    rows, columns = (left[-2:-1] if len(left) > 1 else []), (right[-1:] if len(right) > 1 else [])
    batch = call.broadcast([left[:-2], right[:-2]], call.sizes[: len(call.sizes) - len(rows) - len(columns)])
    for dim in batch:
        dim.use("batch")
    return [*batch, *rows, *columns]


def contract(call: Call, a: Dim, b: Dim, *sources: Any) -> None:
    """Two dimensions that are summed over: with a parameter on one side a reader's, otherwise a score's."""
    call.unify(a, b)
    weighted = any(_is_tensor_of_model(source) for source in sources)
    a.use("in" if weighted else "score")


def _is_tensor_of_model(node: Any) -> bool:
    while isinstance(node, Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return isinstance(node, Node) and node.op == "get_attr"


def _roles(call: Call, name: str, roles: dict[int, str]) -> None:
    tensor = call.tensor_of(call.named.get(name))
    for axis, role in roles.items():
        if tensor is not None and -tensor.dim() <= axis < tensor.dim():
            call.role(tensor, axis, role)


@rule("einsum")
def _einsum(call: Call) -> Axes:
    equation = str(call.named["equation"]).replace(" ", "")
    left, _, right = equation.partition("->")
    given = [call.axes(node) for node in call.named["tensors"]]
    terms = left.split(",")
    if "..." in equation or not right or any(len(t) != len(a) for t, a in zip(terms, given, strict=True)):
        return list(call.unruled("einsum"))
    known: dict[str, Dim] = {}
    for term, axes in zip(terms, given, strict=True):
        for letter, dim in zip(term, axes, strict=True):
            known[letter] = call.unify(known[letter], dim) if letter in known else dim
    weighted = any(_is_tensor_of_model(node) for node in call.named["tensors"])
    for letter, dim in known.items():
        if letter not in right:
            dim.use("in" if weighted else "score")
    for term, node in zip(terms, call.named["tensors"], strict=True):
        tensor = call.tensor_of(node)
        if tensor is not None:
            for axis, letter in enumerate(term):
                call.role(tensor, axis, "out" if letter in right else "in")
    return [known[letter] for letter in right]


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Axes:
    return attended(call, *(call.named[n] for n in ("query", "key", "value")), mask=call.named.get("attn_mask"))


def attended(call: Call, query: Any, key: Any, value: Any, mask: Any = None) -> Axes:
    """softmax(q kT) v, where groups of query heads may share a key and value head."""
    q, k, v = (call.axes(node) for node in (query, key, value))
    call.unify(q[-1], k[-1])
    q[-1].use("score")
    call.unify(k[-2], v[-2])
    k[-2].use("softmax")
    for i in range(len(q) - 2):
        call.unify(k[i], v[i])
        if q[i].size == k[i].size:
            call.unify(q[i], k[i])
        elif k[i].size > 1:
            call.unify(call.split(q[i], k[i].size)[0], k[i])
        q[i].use("batch")
    scores = [*q[:-1], k[-2]]
    if call.axes(mask):
        call.broadcast([scores, call.axes(mask)], [d.size for d in scores])
    return [*q[:-1], v[-1]]


# ---- norms, convolutions -----------------------------------------------------------------------------------------


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
                _roles(call, name, {place: "elementwise"})
    if isinstance(call.node.meta.get("val"), list | tuple):
        return [own, *([*own[: -len(shape)], *[Dim(1) for _ in shape]] for _ in call.all_sizes[1:])]
    return own


@rule("batch_norm", "_native_batch_norm_legit", "native_batch_norm", "instance_norm", "cudnn_batch_norm")
def _batch_norm(call: Call) -> Any:
    own = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unify(own[1], call.axes(name)[0])
            _roles(call, name, {0: "elementwise"})
    if call.named.get("training", call.named.get("use_input_stats")):
        for i, dim in enumerate(own):
            if i != 1:
                dim.use("norm")
    return [own, *([own[1]] for _ in call.all_sizes[1:])] if isinstance(call.node.meta.get("val"), list | tuple) else own


@rule("group_norm", "native_group_norm")
def _group_norm(call: Call) -> Any:
    own = call.axes("input")
    groups, within = call.split(own[1], int(call.named.get("num_groups", call.named.get("group", 1))))
    within.use("norm")
    call.literal("num_groups" if "num_groups" in call.named else "group", None, groups)
    for name in ("weight", "bias"):
        if call.has(name):
            call.unify(own[1], call.axes(name)[0])
            _roles(call, name, {0: "elementwise"})
    return own


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def _convolution(call: Call) -> Axes:
    if call.named.get("transposed"):
        return list(call.unruled("a transposed convolution"))
    weight = call.axes("weight")
    found = convolved(call, call.axes("input"), weight, call.number("groups") or 1)
    _roles(call, "weight", {0: "out", 1: "in"})
    if (call.number("groups") or 1) > 1:
        call.literal("groups", None, call.split(weight[0], call.number("groups") or 1)[0])
    if call.has("bias"):
        call.unify(weight[0], call.axes("bias")[0])
        _roles(call, "bias", {0: "out"})
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
    return [found for _ in call.all_sizes] if isinstance(call.node.meta.get("val"), list | tuple) else found


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


# ---- tables, indices, numbers ------------------------------------------------------------------------------------


@rule("embedding")
def _embedding(call: Call) -> Axes:
    weight = call.axes("weight")
    weight[0].use("index")
    _roles(call, "weight", {0: "rows", 1: "out"})
    return [*call.axes("indices"), weight[1]]


@rule("index", "_unsafe_index")
def _index(call: Call) -> Axes:
    own, indices = call.axes("self"), list(call.named["indices"])
    places = [i for i, index in enumerate(indices) if index is not None]
    call.freeze([own[i] for i in places], "entries of it are picked")
    picked = [call.axes(indices[i]) for i in places]
    rank = len(call.sizes) - (len(own) - len(places))
    adjacent = places == list(range(places[0], places[0] + len(places))) if places else True
    start = places[0] if places and adjacent else 0
    made = call.broadcast(picked, call.sizes[start : start + rank])
    kept = [dim for i, dim in enumerate(own) if i not in places]
    return [*kept[:start], *made, *kept[start:]]


@rule("index_select")
def _index_select(call: Call) -> Axes:
    own, axis = call.axes("self"), int(call.named["dim"])
    call.freeze([own[axis]], "entries of it are picked")
    own[axis] = call.axes("index")[0] if call.axes("index") else call.rigid(call.sizes[axis], "picked entries")
    return own


@rule("gather", "take_along_dim")
def _gather(call: Call) -> Axes:
    own, index, axis = call.axes("self"), call.axes("index"), int(call.named["dim"]) % len(call.axes("self"))
    for i, (a, b) in enumerate(zip(own, index, strict=True)):
        if i == axis:
            call.freeze([a], "entries of it are picked")
        elif a.size == b.size:
            call.unify(a, b)
        else:
            call.freeze([a, b], "entries of it are picked")
    return index


@rule("topk")
def _topk(call: Call) -> list[Axes]:
    own = call.axes("self")
    axis = int(call.named["dim"] if call.named["dim"] is not None else -1) % len(own)
    call.freeze([own[axis]], "its largest entries are picked")
    own[axis] = call.rigid(call.sizes[axis], "the largest entries")
    return [list(own), list(own)]


@rule("arange")
def _arange(call: Call) -> Axes:
    made = Dim(call.sizes[0])
    if not call.number("start") and call.named.get("step", 1) in (None, 1):
        call.literal("end", None, made)
    made.use("order")
    if call.number("end") is None or call.number("start"):
        made.freeze(f"{call.node.name}: its entries are numbered")
    return [made]


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full", "scalar_tensor")
def _made(call: Call) -> Axes:
    found = []
    for place, size in enumerate(call.sizes):
        made = Dim(size)
        given = call.named.get("size")
        literal = given[place] if isinstance(given, list | tuple) and place < len(given) else None
        if isinstance(literal, int):
            call.literal("size", place, made)
        else:
            made.freeze(f"{call.node.name}: a size that is computed")
        found.append(made)
    return found


@rule("sym_size", "sym_numel", "sym_stride", "item", "_local_scalar_dense", "_assert_async", "_assert_scalar")
def _number(call: Call) -> None:
    return None
