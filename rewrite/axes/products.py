"""Rules of operators that sum over axes: reductions, products of matrices, attention."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from rewrite.analysis.carry import is_constant

from .call import Axes, Call, Score
from .dims import Dim
from .operators import elementwise, roles, rule


@rule("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", "prod")
@rule("any", "all", "argmax", "argmin", "max", "min", "median", "nansum")
def _reduced(call: Call) -> Any:
    if call.has("other"):
        return elementwise(call)
    own, along = call.axes("self"), call.named.get("dim")
    axes = range(len(own)) if along is None or along == [] else along if isinstance(along, list | tuple) else [along]
    gone = {int(a) % max(len(own), 1) for a in axes}
    for axis in gone:
        own[axis].use("norm" if call.in_norm else "reduce")
    if call.named.get("keepdim"):
        found = [Dim(1) if i in gone else dim for i, dim in enumerate(own)]
    else:
        found = [dim for i, dim in enumerate(own) if i not in gone]
    return [list(found) for _ in call.all_sizes] if call.gives_several else found


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
    roles(call, "weight", {0: "out", 1: "in"})
    if call.has("bias"):
        call.unify(weight[0], call.axes("bias")[0])
        roles(call, "bias", {0: "out"})
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
    roles(call, "self", {-1: "out"})
    return call.broadcast([found, call.axes("self")], call.sizes)


def _multiplied(call: Call, names: tuple[str, str]) -> Axes:
    left, right = (call.axes(n) for n in names)
    inner = right[-2] if len(right) > 1 else right[-1]
    contract(call, left[-1], inner, *(call.named[n] for n in names))
    roles(call, names[1], {-2: "in", -1: "out"} if len(right) > 1 else {-1: "in"})
    roles(call, names[0], {-2: "out", -1: "in"} if len(left) > 1 else {-1: "in"})
    rows, columns = (left[-2:-1] if len(left) > 1 else []), (right[-1:] if len(right) > 1 else [])
    batch = call.broadcast([left[:-2], right[:-2]], call.sizes[: len(call.sizes) - len(rows) - len(columns)])
    for dim in batch:
        dim.use("batch")
    return [*batch, *rows, *columns]


def contract(call: Call, a: Dim, b: Dim, *sources: Any) -> None:
    """Two dimensions that are summed over: with a parameter on one side a reader's, otherwise a score's."""
    call.unify(a, b)
    weighted = any(isinstance(source, Node) and is_constant(source) for source in sources)
    a.use("in" if weighted else "score")
    if not weighted:
        _score(call, sources[0], sources[1], a)


def _score(call: Call, query: Any, key: Any, dim: Dim) -> None:
    """Note a product of two values in the program's own graph."""
    if call.region == "" and isinstance(query, Node) and isinstance(key, Node):
        call.notes.scores.append(Score(call.node, query, key, dim))


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
    weighted = any(isinstance(node, Node) and is_constant(node) for node in call.named["tensors"])
    for letter, dim in known.items():
        if letter in right:
            if sum(letter in term for term in terms) > 1:
                dim.use("batch")
        else:
            dim.use("in" if weighted else "score")
            if not weighted and len(given) == 2:
                _score(call, call.named["tensors"][0], call.named["tensors"][1], dim)
    for term, node in zip(terms, call.named["tensors"], strict=True):
        tensor = call.tensor_of(node)
        if tensor is not None:
            for axis, letter in enumerate(term):
                call.role(tensor, axis, "out" if letter in right else "in")
    return [known[letter] for letter in right]


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Axes:
    return attended(call, call.named["query"], call.named["key"], call.named["value"], call.named.get("attn_mask"))


def attended(call: Call, query: Any, key: Any, value: Any, mask: Any = None) -> Axes:
    """softmax(q kT) v, where groups of query heads may share a key and value head."""
    q, k, v = (call.axes(node) for node in (query, key, value))
    call.unify(q[-1], k[-1])
    q[-1].use("score")
    _score(call, query, key, q[-1])
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
