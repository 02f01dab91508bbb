"""Everything that a caller can see of a module: what it computes, what it holds; and in what two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.graph.program import Program
from rewrite.graph.properties import thawed
from rewrite.torch_private import pytree

_PLAIN = (bool, int, float, str, bytes, type(None), tuple, torch.dtype, torch.Size)


@dataclass
class Observed:
    """One forward and backward pass: everything that a caller can see of it."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    input_gradients: list[Tensor | None]
    buffers: dict[str, Tensor]
    inputs: list[Tensor]
    random_state: Tensor
    structure: Any = field(default=None)


def observe(module: nn.Module, args: Any, kwargs: Any, *, train: bool, seed: int = 0) -> Observed:
    """Run ``module`` (buffers may move) in one mode; the loss gives each element another weight."""
    module.train(train)
    sources = [t.clone().requires_grad_() if t.is_floating_point() else t.clone() for t in tensors((args, kwargs))]
    live = [t * 1 if t.requires_grad else t for t in sources]
    feed = iter(live)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: next(feed), (args, kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = module(*args, **kwargs)
        state = torch.get_rng_state()
    outputs = tensors(output)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    leaves = [*named.values(), *(s for s in sources if s.requires_grad)]
    loss = projected(outputs)
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    return Observed(
        [t.detach() for t in outputs],
        dict(zip(named, found, strict=False)),
        list(found[len(named) :]),
        {n: b.clone() for n, b in module.named_buffers()},
        [t.detach() for t in live],
        state,
        pytree.tree_structure(output),
    )


def projected(outputs: Sequence[Tensor]) -> Tensor:
    """One number of all outputs that can be trained, every element with another weight, in float64."""
    return sum((_projected(t) for t in outputs if t.requires_grad), torch.zeros((), dtype=torch.float64))


def _projected(output: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().reshape(output.shape)
    return (output.double() * weights).sum()


def tensors(value: Any) -> list[Tensor]:
    """The tensors of nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def differences(a: Observed, b: Observed) -> list[str]:
    """Everything in which two observations are not equal bit for bit, in words."""
    return [
        *_unlike("output", dict(enumerate(a.outputs)), dict(enumerate(b.outputs))),
        *_unlike("gradient", a.gradients, b.gradients),
        *_unlike("input gradient", dict(enumerate(a.input_gradients)), dict(enumerate(b.input_gradients))),
        *_unlike("buffer", a.buffers, b.buffers),
        *_unlike("input", dict(enumerate(a.inputs)), dict(enumerate(b.inputs))),
        *_unlike("random state", {"": a.random_state}, {"": b.random_state}),
        *([] if a.structure == b.structure else [f"structure: {a.structure} against {b.structure}"]),
    ]


def _unlike(what: str, a: Mapping[Any, Tensor | None], b: Mapping[Any, Tensor | None]) -> Iterator[str]:
    if a.keys() != b.keys():
        yield f"{what}s: {sorted(a.keys() ^ b.keys(), key=str)} on one side only"
    for name in a.keys() & b.keys():
        if not same(a[name], b[name]):
            yield f"{what} {name}: {_gap(a[name], b[name])}"


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit; a missing gradient equals one of zeros, NaN equals NaN."""
    if a is None or b is None:
        given = a if a is not None else b
        return given is None or not bool(given.any())
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return a.is_meta or torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _gap(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return " against ".join("none" if t is None else f"{tuple(t.shape)} {t.dtype}" for t in (a, b))
    return f"{float((a.double() - b.double()).abs().max()):.1e} apart"


def outline(model: nn.Module) -> list[Any]:
    """Everything about the modules but the tensors' values: class, flags, hooks, attributes."""
    found = []
    for name, module in model.named_modules():
        attributes = {k: id(v) for k, v in vars(module).items()}
        hooks = [len(v) for k, v in sorted(vars(module).items()) if k.endswith("hooks")]
        found.append((name, type(module), module.training, attributes, hooks))
    return found


def bytes_of(module: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Each parameter and buffer: its identity and a copy of its value."""
    return {
        n: (id(t), t.detach().clone())
        for n, t in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]
    }


def untouched(module: nn.Module, before: Mapping[str, tuple[int, Tensor]]) -> bool:
    """Whether ``module`` still holds the same tensors with the same values as ``bytes_of`` saw."""
    after = bytes_of(module)
    return list(after) == list(before) and all(
        after[n][0] == before[n][0] and same(after[n][1], before[n][1]) for n in before
    )


def graph_lines(program: Program) -> list[str]:
    """The graph as text, a line a node."""
    return [f"{n.op} {n.name} {n.target} {n.args!r} {n.kwargs!r}" for n in program.graph.nodes]


def first_difference(a: Program, b: Program) -> str:
    """The first thing in which two programs are not the same, in words: a node, a layer, a tensor; empty if none is."""
    pairs = (
        (dict(enumerate(graph_lines(a))), dict(enumerate(graph_lines(b)))),
        (_layers(a), _layers(b)),
        ({"properties": str(thawed(a.properties))}, {"properties": str(thawed(b.properties))}),
    )
    for left, right in pairs:
        for key in [*left, *right]:
            if left.get(key) != right.get(key):
                return f"{left.get(key, 'nothing')} against {right.get(key, 'nothing')}"
    return next(_unlike("tensor", a.module.state_dict(), b.module.state_dict()), "")


def _layers(program: Program) -> dict[str, str]:
    """Every module by path: its class, its plain attributes, which parameters it has and which of them train."""
    return {
        path: f"{path or 'the model'} {_described(m)}" for path, m in program.module.named_modules(remove_duplicate=False)
    }


def _described(module: nn.Module) -> str:
    kind = "" if module.__class__.__name__ == "LayerGraph" else f"{type(module).__module__}.{type(module).__qualname__}"
    plain = {
        k: v for k, v in sorted(vars(module).items()) if isinstance(v, _PLAIN) and not k.startswith("_") and k != "code"
    }
    trained = {k: p is not None and p.requires_grad for k, p in module._parameters.items()}
    return f"{kind} {plain} {trained} {list(module._buffers)}"
