"""The frame of a pass: everything outside its edits is the same, node for node and byte for byte.

It is decided from the two programs, without running either, in time linear in nodes and layers. What the journal names is
held to the journal: a replaced layer was, before, what the journal says it was, and is, after, the layer that the journal
names. So putting it back would give the input again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.change import Change, Kind
from rewrite.graph.history import Check
from rewrite.graph.nodes import attribute, gives_kind_alone, literal_arguments
from rewrite.graph.program import Container, Program
from rewrite.graph.properties import thawed
from rewrite.graph.tree import names_of_modules, names_of_tensors

from .identity import Sameness


@dataclass(frozen=True)
class Difference:
    """One thing in which a program differs from the one before: a node's name or a module's path, and how."""

    where: str
    how: str

    def __str__(self) -> str:
        return f"{self.where or 'the program'}: {self.how}"


@dataclass(frozen=True)
class Edits:
    """What a journal accounts for: layers by path, tensors by name, and nodes by name, with all their other names."""

    layers: frozenset[str] = frozenset()
    holders: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()
    called: Mapping[str, str] = field(default_factory=dict)
    made: frozenset[str] = frozenset()
    removed: frozenset[str] = frozenset()
    rewired: frozenset[str] = frozenset()
    swept: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    properties: frozenset[str] = frozenset()
    literals: frozenset[str] = frozenset()

    @classmethod
    def of(cls, after: Program, changes: Sequence[Change]) -> Edits:
        """What ``changes``, which led to ``after``, account for."""
        layers = _aliases(names_of_modules(after.module), [c.path for c in changes if c.new is not None])
        tensors = _aliases(names_of_tensors(after.module), [c.path for c in changes if c.kind in ("set parameter", "untie")])
        called = {name: c.path for c in changes if c.kind == "replace layer" for name in c.nodes}

        def touched(kind: Kind) -> frozenset[str]:
            return frozenset(name for c in changes if c.kind == kind for name in c.nodes)

        swept = frozenset(c.path for c in changes if c.kind == "sweep")
        attributes = frozenset(f"{c.path}.{c.detail.partition(':')[0]}" for c in changes if c.kind == "set attribute")
        nodes = (touched("insert"), touched("remove"), touched("rewire") | touched("repoint"))
        properties = frozenset(c.node for c in changes if c.kind == "set property")
        literals = frozenset(f"{c.node}.{c.detail.partition(':')[0]}" for c in changes if c.kind == "set literal")
        return cls(layers, _above(layers), tensors, called, *nodes, swept, attributes, properties, literals)


def _aliases(names: Mapping[int, Sequence[str]], paths: Sequence[str]) -> frozenset[str]:
    """The paths, and every other name of what is there."""
    group = {name: others for others in names.values() for name in others}
    return frozenset(name for path in paths for name in group.get(path, (path,)))


def _above(paths: frozenset[str]) -> frozenset[str]:
    """The paths of the modules around."""
    parts = [path.split(".") for path in paths]
    return frozenset(".".join(p[:i]) for p in parts for i in range(1, len(p)))


def frame(before: Program, after: Program, changes: Sequence[Change]) -> Check:
    """The check that ``after`` differs from ``before`` where the journal says so, and nowhere else."""
    found = next(_Frame(before, after, changes).differences(), None)
    layers = sum(n.op == "call_module" for n in after.graph.nodes)
    words = f"{len(after.graph.nodes)} nodes, {layers} layers, outside of {len(changes)} edits"
    return Check("frame", found is None, words if found is None else f"{found}, and no edit accounts for it")


def differs(before: Program, after: Program) -> bool:
    """Whether two programs differ in anything at all."""
    return any(True for _ in _Frame(before, after, ()).differences())


@dataclass
class _Frame:
    """Holds a program against the one before, what the journal accounts for left aside."""

    before: Program
    after: Program
    changes: Sequence[Change]
    same: Sameness = field(default_factory=Sameness)

    def __post_init__(self) -> None:
        self.edits = Edits.of(self.after, self.changes)
        self.old = {n.name: n for n in self.before.graph.nodes}
        self.new = {n.name: n for n in self.after.graph.nodes}
        self.calls = {str(n.target) for n in self.after.graph.nodes if n.op == "call_module"}
        self.seen: set[tuple[int, int, bool]] = set()
        self.known = self.edits.tensors | self.edits.attributes | self.edits.swept
        self.set_at: dict[str, list[str]] = {}
        for path, _, name in (each.rpartition(".") for each in self.edits.tensors):
            self.set_at.setdefault(path, []).append(name)

    def differences(self) -> Iterator[Difference]:
        """Everything that no edit accounts for."""
        yield from self._nodes()
        yield from self._interface()
        yield from self._modules("", self.before.module, self.after.module, free=False)
        yield from self._journal()

    def _interface(self) -> Iterator[Difference]:
        if not self.same.value(self.before.module.interface, self.after.module.interface):
            yield Difference("", "its calling convention changed")
        ours, theirs = ((p.example_args, dict(p.example_kwargs)) for p in (self.before, self.after))
        if not self.same.value(ours, theirs):
            yield Difference("", "its example inputs changed")
        old, new = self.before.properties, self.after.properties
        changed = [name for name in {**old, **new} if thawed(old.get(name)) != thawed(new.get(name))]
        yield from (Difference(name, "the property changed") for name in changed if name not in self.edits.properties)

    def _nodes(self) -> Iterator[Difference]:
        gone = [n for n in self.old if n not in self.new and n not in self.edits.removed]
        made = [n for n in self.new if n not in self.old and n not in self.edits.made]
        yield from (Difference(name, "the node is gone") for name in gone)
        yield from (Difference(name, "the node is new") for name in made)
        if [n for n in self.old if n in self.new] != [n for n in self.new if n in self.old]:
            yield Difference("", "its nodes stand in another order")
        for name, node in self.new.items():
            if name in self.old and name not in self.edits.made:
                how = self._node(self.old[name], node)
                if how is not None:
                    yield Difference(name, how)

    def _node(self, old: Node, new: Node) -> str | None:
        if new.op == "get_attr" and new.name in self.edits.rewired:
            return None
        target = self._recalled(old, new) or self.same.value(old.target, new.target)
        if old.op != new.op or not target:
            return f"{old.op} {old.target} became {new.op} {new.target}"
        if new.name not in self.edits.rewired and not self._same_arguments(old, new):
            return "its arguments changed"
        if new.op == "get_attr" and str(new.target) not in self.edits.tensors:
            ours, theirs = attribute(self.before.module, str(old.target)), attribute(self.after.module, str(new.target))
            read = _form if gives_kind_alone(new) else _itself
            return None if self.same.value(read(ours), read(theirs)) else f"the tensor {new.target} changed"
        return None

    def _same_arguments(self, old: Node, new: Node) -> bool:
        """Whether all arguments are the same, those aside that were set."""
        if not any(name.startswith(f"{new.name}.") for name in self.edits.literals):
            return self.same.arguments(old, new)
        ours, theirs = (
            {k: v for k, v in literal_arguments(n).items() if f"{new.name}.{k}" not in self.edits.literals}
            for n in (old, new)
        )
        return self.same.value(ours, theirs)

    def _recalled(self, old: Node, new: Node) -> bool:
        """Whether the node calls the path at which the journal says its layer was replaced."""
        return old.op == new.op == "call_module" and self.edits.called.get(new.name) == new.target

    def _modules(self, path: str, old: nn.Module, new: nn.Module, free: bool) -> Iterator[Difference]:
        """Below an edited layer everything is part of it but the layers that the graph calls by themselves."""
        free = path in self.edits.layers or (free and path not in self.calls)
        if (id(old), id(new), free) in self.seen:
            return
        self.seen.add((id(old), id(new), free))
        if not free:
            yield from self._module(path, old, new)
        for name, child in new._modules.items():
            before = old._modules.get(name)
            if child is not None and before is not None:
                yield from self._modules(_join(path, name), before, child, free)

    def _module(self, path: str, old: nn.Module, new: nn.Module) -> Iterator[Difference]:
        names = [*old._parameters, *old._buffers, *new._parameters, *new._buffers, *vars(new)] if self.known else []
        left_out = [name for name in names if _join(path, name) in self.known]
        temporary = old._non_persistent_buffers_set ^ new._non_persistent_buffers_set
        accounted = self.edits.swept | self.edits.tensors
        if temporary and all(_join(path, name) in accounted for name in temporary):
            left_out.append("_non_persistent_buffers_set")
        how = self.same.unlike(old, new, left_out)
        if how is not None:
            yield Difference(path, how)
        ours = [n for n in old._modules if n in new._modules or _join(path, n) not in self.edits.swept]
        theirs = [n for n in new._modules if n in old._modules]
        if ours != theirs:
            yield Difference(path, "a module in it is gone or stands in another place")
        for name, child in new._modules.items():
            inner = _join(path, name)
            if name in old._modules:
                if (child is None) != (old._modules[name] is None):
                    yield Difference(inner, "the module came or went")
            elif inner not in self.edits.layers:
                yield from self._new_module(inner, child)

    def _new_module(self, path: str, module: nn.Module | None) -> Iterator[Difference]:
        """A module that was not there holds new layers, and is nothing else."""
        if path not in self.edits.holders or type(module) is not Container:
            yield Difference(path, "the module is new")
            return
        yield from self._module(path, Container().train(module.training), module)

    def _journal(self) -> Iterator[Difference]:
        """What the journal says of the first layer at each path, and of the last."""
        replaced = [c for c in self.changes if c.new is not None]
        for change in {c.path: c for c in reversed(replaced)}.values():
            yield from self._was(change)
        for change in {c.path: c for c in replaced}.values():
            now = attribute(self.after.module, change.path)
            if now is not change.new and not (now is None and change.path in self.edits.swept):
                yield Difference(change.path, "another layer is there than the journal names")

    def _was(self, change: Change) -> Iterator[Difference]:
        """Whether the layer that a change replaced is, as the journal keeps it, what the program before had there.

        Tensors that were set or put into it before it was replaced are no part of that.
        """
        nodes = [self.old[name] for name in change.nodes if name in self.old]
        path = str(nodes[0].target) if nodes else change.path
        before, set_since = attribute(self.before.module, path), self.set_at.get(path, ())
        if change.old is None:
            if before is not None:
                yield Difference(change.path, "the journal knows of no layer that was there")
        elif not isinstance(before, nn.Module) or self.same.unlike(before, change.old, set_since) is not None:
            yield Difference(path, "the layer that was replaced is not what it was")


def _form(tensor: Any) -> Any:
    """What of a tensor is read where only its dtype and its device are."""
    return (tensor.dtype, tensor.device) if isinstance(tensor, torch.Tensor) else tensor


def _itself(tensor: Any) -> Any:
    return tensor


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
