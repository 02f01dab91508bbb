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
    for i in places:
        _picked(call, own[i], indices[i])
    picked = [call.axes(indices[i]) for i in places]
    rank = len(call.sizes) - (len(own) - len(places))
    adjacent = places == list(range(places[0], places[0] + len(places))) if places else True
    start = places[0] if places and adjacent else 0
    made = call.broadcast(picked, call.sizes[start : start + rank])
    kept = [dim for i, dim in enumerate(own) if i not in places]
    return [*kept[:start], *made, *kept[start:]]


def _picked(call: Call, dim: Dim, index: object) -> None:
    """Entries are picked: a constant one is a part of its own, and the side that it is counted from cannot change."""
    number = call.constant(index)
    if number is None or not -dim.size <= number < dim.size:
        call.freeze([dim], "entries of it are picked")
        return
    sizes = [number % dim.size, 1, dim.size - number % dim.size - 1]
    parts = iter(call.cut(dim, [size for size in sizes if size]))
    before, _, after = (next(parts) if size else Dim(0) for size in sizes)
    call.freeze([before] if number >= 0 else [after], "an entry beside it is picked by number")


@rule("index_put", "index_put_", "_unsafe_index_put")
def _index_put(call: Call) -> Axes:
    own, indices, values = call.axes("self"), list(call.named["indices"]), call.axes("values")
    places = [i for i, index in enumerate(indices) if index is not None]
    call.freeze([own[i] for i in places], "entries of it are set")
    rest = own[len(indices) :]
    for dim, other in zip(reversed(rest), reversed(values), strict=False):
        if dim.size == other.size:
            call.unify(dim, other)
    call.freeze([dim for i, dim in enumerate(own[: len(indices)]) if i not in places], "entries beside it are set")
    return own


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
    made, start = Dim(call.sizes[0]), call.named.get("start") or 0
    each = call.named.get("step", 1) in (None, 1)
    made.use("order")
    if call.number("end") is None or not isinstance(start, int) or not each:
        made.freeze(f"{call.node.name}: its entries are numbered")
    else:
        call.literal("end", None, made, start=start)
    return [made]


@rule("diff")
def _diff(call: Call) -> Axes:
    own = call.axes("self")
    axis = int(call.named["dim"] if call.named.get("dim") is not None else -1) % len(own)
    call.freeze([own[axis]], "the order of its entries counts")
    own[axis] = call.rigid(call.sizes[axis], "differences of entries beside each other")
    return own


@rule("histc", "bincount")
def _counted(call: Call) -> Axes:
    return [call.rigid(size, "each of its entries counts a number") for size in call.sizes]


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
