"""FakeTensor values of nodes: shapes and dtypes without computing, inferred once for each operator and layer alike."""

from __future__ import annotations

import operator
import types
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.torch_private import FakeTensor, FakeTensorMode, OpOverload, enable_python_dispatcher

from .nodes import attribute, leaves


class Fakes:
    """What shape inference found so far, to be found again at other nodes: by what is called and on which shapes.

    A layer counts by its configuration: its class, plain attributes, and the shapes of its tensors.
    """

    def __init__(self) -> None:
        self.values: dict[Hashable, Any] = {}
        self.tensors: dict[Hashable, torch.Tensor] = {}

    def like(self, tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
        """A fake tensor like this one; made under the mode."""
        layout = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, mode)
        if layout not in self.tensors:
            self.tensors[layout] = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=layout[3])
        return self.tensors[layout]


def fake_value(
    module: nn.Module,
    node: Node,
    values: Mapping[Node, Any] | None = None,
    known: Fakes | None = None,
    layer: nn.Module | None = None,
) -> Any:
    """What a node computes on FakeTensors: those in ``values``, else the ones that its inputs carry.

    ``known`` keeps what was inferred, from call to call. ``layer`` stands in for the layer that the node calls.
    """
    known = Fakes() if known is None else known
    if node.op == "get_attr":
        return _fake_of(attribute(module, str(node.target)), node, known, values or {})

    def fake(source: Node) -> Any:
        return values[source] if values is not None and source in values else source.meta.get("val")

    args: Any = torch.fx.map_arg(node.args, fake)
    kwargs = torch.fx.map_arg(dict(node.kwargs), fake)
    target: Any = node.target
    if target is operator.getitem and isinstance(args[0], list | tuple):
        return args[0][args[1]]  # looked up sooner than described
    if node.op == "call_module":
        target = attribute(module, str(node.target)) if layer is None else layer
    mode = _fake_mode([args, kwargs]) or _fake_mode([n.meta.get("val") for n in node.graph.nodes])
    key = call_key(target, args, kwargs, mode)
    if key is not None and key in known.values:
        return known.values[key]
    found = _infer(target, args, kwargs, mode, known)
    if key is not None:
        known.values[key] = found
    return found


def _fake_of(held: Any, node: Node, known: Fakes, values: Mapping[Node, Any]) -> Any:
    """A tensor that a graph reads, as a fake one, of the mode of the graph's values or of those given."""
    mode = _fake_mode([n.meta.get("val") for n in node.graph.nodes]) or _fake_mode(list(values.values()))
    if mode is None or not isinstance(held, torch.Tensor):
        return node.meta.get("val")
    with mode:
        return known.like(held, mode)


def call_key(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode | None) -> Hashable | None:
    """All that the shapes a function or layer gives depend on; None where it may depend on more."""
    try:
        return mode, _configuration(target), _described(args), _described(kwargs)
    except _UndescribedError:
        return None


def _infer(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode | None, known: Fakes) -> Any:
    with mode or nullcontext(), torch.no_grad(), enable_python_dispatcher():
        if mode is None or not isinstance(target, nn.Module):
            return target(*args, **kwargs)
        state = {name: known.like(t, mode) for name, t in [*target.named_parameters(), *target.named_buffers()]}
        with evaluating(target):
            return torch.func.functional_call(target, state, args, kwargs)


class _UndescribedError(Exception):
    """Something that inference may depend on has no description: it is inferred anew."""


def _configuration(target: Any) -> Hashable:
    """All that a function's, or a layer's, output shapes depend on besides its inputs."""
    if not isinstance(target, nn.Module):
        return target  # type: ignore[no-any-return]
    if any(getattr(target, hooks) for hooks in _HOOKS):
        raise _UndescribedError
    plain = tuple((name, _described(value)) for name, value in vars(target).items() if name not in _MODULE)
    tensors = tuple((name, _described(t)) for held in (target._parameters, target._buffers) for name, t in held.items())
    return type(target), plain, tensors, tuple((name, _configuration(child)) for name, child in target._modules.items())


_MODULE = frozenset({*vars(nn.Module()), "runs"})  # a region runs what was made of its graphs
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device, torch.layout)
_CODE = (torch.memory_format, types.FunctionType, types.BuiltinFunctionType, OpOverload)


def _described(value: Any) -> Hashable:
    """A plain value, with its type (1 is not True); a tensor by its layout, a size by its expression."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise _UndescribedError
        return (
            type(value),
            *map(expression_of, value.shape),
            "|",
            *map(expression_of, value.stride()),
            value.dtype,
            value.device,
        )
    if isinstance(value, list | tuple):
        return (type(value), *map(_described, value))
    if isinstance(value, dict):
        return (dict, *((_described(k), _described(v)) for k, v in value.items()))
    if isinstance(value, Graph):
        return _described_graph(value)
    if isinstance(value, slice):
        return (slice, *map(_described, (value.start, value.stop, value.step)))
    if isinstance(value, torch.SymInt):
        return expression_of(value)
    if not isinstance(value, _PLAIN + _CODE):
        raise _UndescribedError
    return type(value), value


def _described_graph(graph: Graph) -> Hashable:
    """What a graph computes, whatever its nodes are called."""
    place = {node: i for i, node in enumerate(graph.nodes)}

    def arguments(value: Any) -> Any:
        if isinstance(value, Node):
            return Node, place[value]
        if isinstance(value, list | tuple):
            return type(value), *map(arguments, value)
        if isinstance(value, dict):
            return dict, *((key, arguments(held)) for key, held in value.items())
        return _described(value)

    return (
        Graph,
        *((n.op, "" if n.op == "placeholder" else n.target, arguments(n.args), arguments(n.kwargs)) for n in place),
    )


def expression_of(size: Any) -> Hashable:
    """A size as a number, or the expression of one that is computed: two are equal where they always are."""
    return size.node.expr if isinstance(size, torch.SymInt) else size  # type: ignore[no-any-return]


def same_shape(a: Node, b: Node) -> bool:
    """Whether two values always have one shape: expressions are compared, since sizes compared as such are evaluated."""
    x, y = (tuple(map(expression_of, getattr(node.meta.get("val"), "shape", [node]))) for node in (a, b))
    return x == y


@contextmanager
def evaluating(layer: nn.Module) -> Iterator[None]:
    """The layer in evaluation mode: in training some read data, which fake tensors do not have."""
    modes = {part: part.training for part in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _fake_mode(values: Any) -> FakeTensorMode | None:
    for leaf in leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return None
