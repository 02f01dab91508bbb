"""The layer graph as a module, and the Program around it: example inputs, dynamic dimensions, opaque parts, history."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Graph, Node

from rewrite.errors import RewriteError

from .codegen import compile_graph, copy_graph
from .copies import copied_children, uncollected
from .fakes import Fakes
from .home import Home
from .interface import Interface, make_forward
from .maps import Step
from .nodes import attribute
from .properties import NONE, Running, checked, executed, under

if TYPE_CHECKING:
    from .history import Record


class Container(nn.Module):
    """A module that only holds others: what is left of a user's module once its forward is in the graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RewriteError("this module only holds parameters and layers; call the program's module itself")


class LayerGraph(nn.Module):
    """A model as one ``torch.fx`` graph over ``torch.nn`` layers at the paths they have in the user's model.

    It is called, trained, moved and cast as the model is. Each instance has a class of its own, so that ``forward`` can
    carry the model's signature. What is known of its shapes is shared by its copies.
    """

    graph: Graph
    interface: Interface
    code: str
    shapes: Fakes
    properties: Mapping[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> LayerGraph:
        own = type("LayerGraph", (LayerGraph,), {"__module__": cls.__module__})
        return nn.Module.__new__(own)

    def __init__(self, root: nn.Module, graph: Graph, interface: Interface) -> None:
        super().__init__()
        self.adopt(root)
        self.__dict__["graph"] = graph
        self.__dict__["interface"] = interface
        self.__dict__["shapes"] = Fakes()
        self.__dict__["properties"] = NONE
        self.recompile()

    def adopt(self, root: nn.Module) -> None:
        """Take over the parameters, buffers and modules of ``root``, in their order."""
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = root.__dict__[kind]
        self.training = root.training

    def recompile(self) -> None:
        """Generate ``forward`` anew from the graph; needed after every edit, done by the edit layer."""
        run, source = compile_graph(self.graph)
        self.__dict__["code"] = source
        running = Running(lambda graph: run if graph is self.graph else compile_graph(graph)[0])
        run = executed(self.graph, running, self.properties)
        type(self).forward = make_forward(self.interface, under(run, self.properties))

    def assume(self, properties: Mapping[str, Any]) -> None:
        """Run under these properties from now on. Raises RewriteError for one that is not known, or has a wrong value."""
        self.__dict__["properties"] = checked(properties)
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerGraph:
        root = nn.Module()
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            held = self.__dict__[kind]
            root.__dict__[kind] = copied_children(held, memo) if kind == "_modules" else copy.deepcopy(held, memo)
        root.training = self.training
        made = LayerGraph.__new__(LayerGraph)
        memo[id(self)] = made
        nn.Module.__init__(made)
        made.adopt(root)
        made.__dict__.update(graph=copy_graph(self.graph), interface=self.interface, code=self.code, shapes=self.shapes)
        made.__dict__["properties"] = self.properties
        type(made).forward = type(self).forward  # the same graph under the same names: the same code
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RewriteError(
            "a layer graph is not pickled: use rewrite.save(program, 'x.pt2'), or rewrite.graft to "
            "get your own class back and torch.save that"
        )


@dataclass(frozen=True)
class Dimension:
    """One dimension of one graph input: dynamic, or static with the reason."""

    input: str
    axis: int
    size: int
    dynamic: bool
    reason: str = ""

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else f"static: {self.reason}"
        return f"{self.input}[{self.axis}]={self.size} ({kind})"


@dataclass(frozen=True)
class Opaque:
    """A part of the model that passes cannot see into."""

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}, {self.reason}"


@dataclass(frozen=True)
class Origin:
    """Where a program comes from: the model's class, its parameter shapes, what capture measured and noticed.

    ``home`` is how the model was built, unless the program comes from a file.
    """

    model_class: str
    parameter_shapes: Mapping[str, tuple[int, ...]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    home: Home | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Program:
    """A captured model. Passes work on a copy of it; nobody changes one in place once it is handed out.

    ``lineage`` is how each pass's parameters follow from those before; it is kept in memory, and not in a file.
    """

    module: LayerGraph
    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]
    opaque: tuple[Opaque, ...]
    origin: Origin
    history: tuple[Record, ...] = ()
    lineage: tuple[Step, ...] = field(default=(), repr=False)

    @property
    def graph(self) -> Graph:
        """The ``torch.fx`` graph of the module."""
        return self.module.graph

    @property
    def properties(self) -> Mapping[str, Any]:
        """What holds for the whole program and is no node of its graph, by name; passes set it by the editor."""
        return self.module.properties

    def clone(self, *, share: bool = False) -> Program:
        """A program with its own skeleton and graph; its tensors are copies, or the same ones with ``share``."""
        memo: dict[int, Any] = {}
        if share:
            memo = {id(t): t for t in tensors_of(self.module)}
        with uncollected():
            return replace(self, module=copy.deepcopy(self.module, memo))

    def layer(self, node: Node) -> nn.Module:
        """The layer that a ``call_module`` node calls."""
        if node.op != "call_module":
            raise TypeError(f"{node.name} is a {node.op}, not a call_module")
        found = attribute(self.module, str(node.target))
        assert isinstance(found, nn.Module)
        return found

    def layers(self) -> Iterator[tuple[Node, nn.Module]]:
        """Every ``call_module`` node with its layer, in execution order."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.layer(node)

    def __str__(self) -> str:
        return f"Program of {self.origin.model_class}: {len(self.graph.nodes)} nodes, {len(self.history)} passes"


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer of ``module``, each once."""
    yield from module.parameters()
    yield from module.buffers()
