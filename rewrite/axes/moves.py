"""Rules of operators that move, cut, join and repeat axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from rewrite.graph.nodes import aten, packet

from .call import Axes, Call
from .dims import Dim, concatenated, product
from .operators import rule


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy")
def _view(call: Call) -> Axes:
    found = call.reshaped(call.axes("self"), call.sizes)
    name = "size" if "size" in call.named else "shape"
    for place, dim in enumerate(found):
        call.literal(name, place, dim)
        call.computed(call.named[name][place], dim)
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
        reason = "a size of the input" if isinstance(count, Node) else "copies of a tensor"
        found.append(dim if count == 1 else product([call.rigid(copies, reason), dim]))
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
        call.literal("length" if "length" in call.named else "end", None, own[axis])
        return own
    start, step = call.named.get("start") or 0, call.named.get("step") or 1
    if step != 1 and isinstance(start, int) and 0 <= start < step and size * step == own[axis].size:
        own[axis], each = call.split(own[axis], size)  # one of each few that lie side by side
        call.freeze([each], "one of them is taken by number")
        return own
    if not isinstance(start, int) or step != 1 or "a size of the input" in own[axis].root().rigid:
        call.freeze([own[axis]], "a part of it is taken by number")
        own[axis] = call.rigid(size, "a part that is taken by number")
        return own
    start = start % own[axis].size if start < 0 else start
    if not size:
        return _nothing(call, own, axis, start)
    sizes = [start, size, own[axis].size - start - size]
    kept = iter(call.cut(own[axis], [s for s in sizes if s]))
    before, part, after = (next(kept) if s else Dim(0) for s in sizes)
    call.literal("start", None, before)
    call.literal("start", None, concatenated([part, after]), -1)
    if "length" in call.named:
        call.literal("length", None, part)
    else:
        call.literal("end", None, concatenated([before, part]) if after.size else own[axis])
        call.literal("end", None, after, -1)
    own[axis] = part
    return own


def _nothing(call: Call, own: Axes, axis: int, start: int) -> Axes:
    """A part without entries, at the end of a dimension or its start."""
    if start >= own[axis].size:
        call.literal("start", None, own[axis])
    elif start:
        call.freeze([own[axis]], "a part of it is taken by number")
    own[axis] = Dim(0)
    return own


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
    return [own, own] if call.gives_several else own


@rule("constant_pad_nd", "pad", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d")
def _pad(call: Call) -> Axes:
    found = []
    for dim, size in zip(call.axes("self"), call.sizes, strict=True):
        if dim.size != size:
            call.freeze([dim], "it is padded")
        found.append(dim if dim.size == size else call.rigid(size, "padded"))
    return found
