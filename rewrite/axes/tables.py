"""Rules of operators on tables, indices and sizes."""

from __future__ import annotations

from .call import Axes, Call
from .dims import Dim
from .operators import roles, rule


@rule("embedding")
def _embedding(call: Call) -> Axes:
    weight = call.axes("weight")
    weight[0].use("index")
    roles(call, "weight", {0: "rows", 1: "out"})
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
    each = call.named.get("step", 1) in (None, 1)
    if not call.number("start") and each:
        call.literal("end", None, made)
    made.use("order")
    if call.number("end") is None or call.number("start") or not each:
        made.freeze(f"{call.node.name}: its entries are numbered")
    return [made]


@rule("eye")
def _eye(call: Call) -> Axes:
    return [call.rigid(size, "its entries are numbered") for size in call.sizes]


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
