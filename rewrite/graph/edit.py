"""The only way to change a graph. Every change is journaled, keeps metadata and values, and says where it came from.

An editor works on a program of its own (``apply`` clones before a pass). Tensors are never written in place: a changed
parameter is a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import Argument

from rewrite.errors import RewriteError, first_line
from rewrite.torch_private import pytree

from . import meta
from .fakes import expression_of, fake_value
from .maps import Compute, Constant, ParameterMap
from .module_calls import ModuleCall, module_calls
from .nodes import attribute, gives_kind_alone, is_pure, leaves, literal_arguments, module_stack, set_argument
from .program import Container, Program
from .properties import thawed
from .relation import Relation
from .renumber import renumber
from .repeat import repeat, span
from .sizes import followed
from .tree import Places, names_of_tensors

Kind = Literal[
    "replace layer",
    "replace module",
    "insert",
    "remove",
    "rewire",
    "repoint",
    "set parameter",
    "set attribute",
    "set literal",
    "set property",
    "sweep",
    "untie",
    "move",
    "renumber",
]


@dataclass(frozen=True)
class Change:
    """One change of a program: what was done, to which node and path, and the layer that stood there before.

    ``nodes`` are the names of all nodes that it touched: the calls of a replaced layer, the users that were rewired.
    ``map`` says how a parameter that was set follows from those before the pass, ``relations`` how values that were moved
    follow, by node. ``names`` maps the paths of modules that
    were renumbered to their new ones, in which all other changes speak.
    """

    kind: Kind
    path: str
    node: str
    detail: str
    old: nn.Module | None = None
    new: nn.Module | None = None
    nodes: tuple[str, ...] = ()
    map: ParameterMap | None = None
    names: tuple[tuple[str, str], ...] = ()
    relations: Mapping[str, Relation] = field(default_factory=dict)


class Editor:
    """Changes one program on behalf of one pass."""

    def __init__(self, program: Program, author: str) -> None:
        self.program = program
        self.author = author
        self.changes: list[Change] = []
        self.graph = program.graph
        self._places = Places(program.module)
        self._calls = Calls(program.graph)
        self._numbers: Counter[str] = Counter()
        self._maps: dict[str, ParameterMap] = {}
        self._readers: dict[Node, None] = {}
        self._gone: dict[str, None] = {}
        self._came: set[str] = set()
        self._reshaped: set[Node] = set()
        self._seen = 0
        self._edited: tuple[frozenset[str], frozenset[str]] = frozenset(), frozenset()

    def replace_layer(
        self, path: str, layer: nn.Module, calls: Sequence[Node] | None = None, *, reshape: bool = False
    ) -> None:
        """Replace the layer at ``path`` by ``layer``, for all its calls or for some.

        Where only some ``calls`` are replaced, the others keep the old layer and these get ``layer`` at a path of its
        own beside it. Children of the old layer stay below the new one: they are layers of their own.

        Raises RewriteError if the new layer's output differs in shape or dtype from the old one's; nothing is changed then.
        With ``reshape`` it may have another shape: what reads it has to be edited too, which is checked after the pass.
        """
        old = attribute(self.program.module, path)
        if not isinstance(old, nn.Module):
            raise RewriteError(f"there is no layer at {path}")
        every = self._calls.of(path)
        calls = every if calls is None else list(calls)
        values = [self._checked(node, layer, reshape) for node in calls]
        layer.train(old.training)
        for name, child in old._modules.items():
            layer._modules.setdefault(name, child)
        target = path if len(calls) == len(every) else self._beside(path)
        self._put(target, layer)
        for node, value in zip(calls, values, strict=True):
            self._calls.move(node, target)
            if _shapes(value) != _shapes(meta.VALUE.of(node)):
                self._reshaped.add(node)
            meta.VALUE.set(node, value)
            self._sign(node, [node])
        names = tuple(n.name for n in calls)
        self._note("replace layer", target, ", ".join(names), f"{_kind(old)} -> {_kind(layer)}", names, old, layer)
        self._repoint(self._calls.reads_below(path))

    def replace_module(self, path: str, layer: nn.Module) -> None:
        """Replace every call of the user's module at ``path``, with all that is in it, by a call of ``layer``.

        ``layer`` is given the one tensor that flows into the module and gives the one that flows out of it. ``graft`` puts
        it in the module's place, whatever else your class hands to the module, or takes from it.

        Raises RewriteError where the module is not called, is given or gives more tensors than one, holds a layer that is
        called from elsewhere, or where the new output has another shape or dtype; nothing is changed then.
        """
        calls = module_calls(self.graph, path)
        if not calls:
            raise RewriteError(f"there is no call of a module at {path} in this program")
        ends = [call.single() for call in calls]
        old = attribute(self.program.module, path)
        self._check_alone(path, calls)
        for source, result in ends:
            self._check_gives(path, layer, source, result)
        layer.train(old.training if isinstance(old, nn.Module) else self.program.module.training)
        self._put(path, layer)
        kind = calls[0].stack[calls[0].key][1]
        words = f"{str(getattr(kind, '__qualname__', kind)).rpartition('.')[2]} -> {_kind(layer)}"
        made = [self._call_instead(call, source, result) for call, (source, result) in zip(calls, ends, strict=True)]
        self._note("replace module", path, ", ".join(made), words, tuple(made), old, layer)
        self.remove_unused([n for call in calls for n in call.nodes], path, "what the module did")

    def _check_alone(self, path: str, calls: Sequence[ModuleCall]) -> None:
        inside = {node for call in calls for node in call.nodes}
        for node in self.graph.nodes:
            below = node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{path}.")
            if below and node not in inside and not inside.issuperset(node.users):
                raise RewriteError(f"{node.target}, which is part of the module at {path}, is used outside of it too")

    def _check_gives(self, path: str, layer: nn.Module, source: Node, result: Node) -> None:
        with self.graph.inserting_after(result):
            probe = self.graph.call_module(path, (source,))
        try:
            found = fake_value(self.program.module, probe, layer=layer)
        finally:
            self.graph.erase_node(probe)
        old, new = _shapes(meta.VALUE.of(result)), _shapes(found)
        if old != new:
            raise RewriteError(f"the new layer at {path} gives {new} where the module gave {old}")

    def _call_instead(self, call: ModuleCall, source: Node, result: Node) -> str:
        with self.graph.inserting_after(result):
            made = self.graph.call_module(call.path, (source,))
        self._calls.add(made)
        meta.inherit(made, result)
        meta.STACK.set(made, call.stack)
        meta.WHOLE.set(made, True)
        meta.VALUE.set(made, self.value_of(made))
        self._note("insert", call.path, made.name, f"in place of {len(call.nodes)} nodes", (made.name,))
        inside = set(call.nodes)
        self.rewire(result, made, lambda user: user not in inside)
        return made.name

    def insert_layer(
        self, path: str, layer: nn.Module, inputs: Sequence[Argument], *, after: Node, place: Sequence[int] = ()
    ) -> Node:
        """Call a new layer at a free ``path`` on ``inputs``, right after a node; the node of its value.

        ``place`` is where it stands in the module tree, as ``place`` gives it for a path; at the end of its parent without.
        """
        self._put(self._free(path), layer, place)
        with self.graph.inserting_after(after):
            made = self.graph.call_module(path, tuple(inputs))
        return self._inserted(made, after, f"{_kind(layer)} at {path}", layer)

    def insert_function(
        self,
        target: Callable[..., Any],
        args: Sequence[Argument],
        kwargs: Mapping[str, Argument] | None = None,
        *,
        after: Node,
    ) -> Node:
        """Call a function (an ATen overload) on ``args``, right after a node; the node of its value."""
        with self.graph.inserting_after(after):
            made = self.graph.call_function(target, tuple(args), dict(kwargs or {}))
        return self._inserted(made, after, str(target), None)

    def rewire(self, old: Node, new: Node, users: Callable[[Node], bool] = lambda user: True) -> None:
        """Let the users of ``old`` (those that ``users`` accepts) use ``new`` instead."""
        changed = old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new and users(user))
        self._sign(new, [old])
        if changed:
            self._note("rewire", "", new.name, f"{len(changed)} uses of {old.name}", tuple(n.name for n in changed))

    def remove(self, node: Node) -> None:
        """Remove a node that nothing uses. Raises RewriteError if something does."""
        path = str(node.target) if node.op in ("call_module", "get_attr") else ""
        self._erase(node)
        self._note("remove", path, node.name, "", (node.name,))

    def remove_unused(self, nodes: Collection[Node], path: str, detail: str) -> None:
        """Remove those of ``nodes`` that nothing uses any more, and all that only they used: parameters that they read,
        layers and pure operators that fed them alone. Inputs of the graph stay.

        It is one change, at ``path``, of what ``detail`` says.
        """
        waiting = dict.fromkeys(sorted(nodes, reverse=True))
        names: list[str] = []
        while (node := next((n for n in waiting if not n.users), None)) is not None:
            del waiting[node]
            sources = node.all_input_nodes
            names.append(node.name)
            self._erase(node)
            fed = (s for s in sources if s.op == "call_module" or (s.op != "placeholder" and is_pure(s)))
            waiting.update(dict.fromkeys(fed))
        self._note("remove", path, ", ".join(names), f"{detail}, {len(names)} nodes", tuple(names))

    def _erase(self, node: Node) -> None:
        if node.users:
            raise RewriteError(f"{node.name} is still used by {', '.join(u.name for u in node.users)}")
        self._readers.pop(node, None)
        self._readers.update((n, None) for n in node.all_input_nodes if n.op == "get_attr")
        if node.op in ("call_module", "get_attr"):
            self._gone[str(node.target)] = None
        self._calls.drop(node)
        self.graph.erase_node(node)

    def set_parameter(self, path: str, value: torch.Tensor | Compute, *sources: str) -> None:
        """Set the parameter or buffer at ``path``, to a tensor or to ``value(*sources)``; all places that share it follow.

        Given as a function of other parameters (their names as they are now, or were in a layer that was replaced), the
        change can be proven: the proof evaluates it in float64 and pulls gradients back to the sources. It then may have
        another shape, and one that is not there yet is made, as a parameter if a source is one.

        Raises RewriteError where there is no such layer, and no such parameter either unless ``value`` is a function.
        """
        made = None if isinstance(value, torch.Tensor) else self._map(value, sources)
        old = attribute(self.program.module, path)
        if old is None and made is None:
            raise RewriteError(f"there is no parameter or buffer {path}")
        given = [self._tensor(source) for source in sources]
        with torch.no_grad():
            new = _own(value if isinstance(value, torch.Tensor) else value(*given), [*given, value])
        trained = old.requires_grad if isinstance(old, torch.Tensor) else any(t.requires_grad for t in given)
        is_parameter = isinstance(old, nn.Parameter) if old is not None else any(isinstance(t, nn.Parameter) for t in given)
        self._hold(path, nn.Parameter(new, trained) if is_parameter else new)
        shape = tuple(old.shape) if isinstance(old, torch.Tensor) else "none"
        self._note("set parameter", path, "", f"{shape} -> {tuple(new.shape)}", map=made)
        if made is not None:
            self._maps[path] = made

    def untie(self, path: str) -> list[str]:
        """Give the tensor at ``path`` memory of its own, with the same values; the names that it was shared with.

        Raises RewriteError where it is shared with nothing.
        """
        tensor = self._tensor(path)
        others = [name for name in names_of_tensors(self.program.module)[id(tensor)] if name != path]
        if not others:
            raise RewriteError(f"{path} is shared with nothing")
        holder, name = self._parent(path)
        held = holder._parameters if name in holder._parameters else holder._buffers
        copy = tensor.detach().clone()
        held[name] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        self._places = Places(self.program.module)
        source = min((path, *others), key=list(dict(self._named())).index)
        detail = f"was one with {', '.join(others)}"
        untied: tuple[tuple[str, Kind], ...] = ((path, "untie"), (others[0], "set parameter"))
        for own, kind in untied:  # each is known to the proof by its first name
            self._maps[own] = self._map(_itself, (source,))
            self._note(kind, own, "", detail if own == path else f"no longer one with {path}", map=self._maps[own])
        return others

    def _named(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.program.module.named_parameters(remove_duplicate=False)
        yield from self.program.module.named_buffers(remove_duplicate=False)

    def renumber(self, names: Mapping[str, str]) -> None:
        """Give modules of lists other numbers, so that new ones fit in between: old paths to new ones.

        It has to be the first edit of a pass. Raises RewriteError if it is not, and where two would have one name.
        """
        if self.changes:
            raise RewriteError("modules are renumbered before anything else is edited")
        if not names:
            return
        renumber(self.program.module, names)
        self._places, self._calls = Places(self.program.module), Calls(self.graph)
        holders = ", ".join(dict.fromkeys(old.rpartition(".")[0] for old in names))
        words = ", ".join(f"{old} -> {new}" for old, new in names.items())
        self.changes.append(Change("renumber", holders, "", words, names=tuple(names.items())))

    def repeat(self, path: str, to: str, first: Node, last: Node, after: Node | None = None) -> Node:
        """Run what leads from the value ``first`` to ``last`` once more behind ``after`` (or ``last``), with a copy at
        ``to`` of the module at ``path``; the node of its value, which all read that read ``after``.

        Raises RewriteError where ``to`` is not free, or the module shares a tensor with another one.
        """
        return repeat(self, path, to, span(first, last, path), first, last, after or last)

    def came(self, made: Node, source: Node) -> None:
        """Note a node that is a copy of another one."""
        self._calls.add(made)
        self._sign(made, [source])
        path = str(made.target) if made.op == "call_module" else ""
        self._note("insert", path, made.name, f"a copy of {source.name}", (made.name,))

    def hang(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        """Put a new module into the tree."""
        self._places.put(holder, name, module)

    def note_new(self, path: str, layer: nn.Module | None) -> None:
        """Note a layer, or a tensor of none, that came with a module."""
        self._came.add(path)
        self._note("insert" if layer is not None else "set parameter", path, "", "came with a copied module", new=layer)

    def move(self, nodes: Collection[Node], detail: str, relation: Relation | Mapping[Node, Relation] | None = None) -> None:
        """Note that the values of some nodes become others on purpose. The proof holds what reads them, and not them.

        With a ``relation`` (one for all, or by node) they become r(x): each node is held to it where it stands, and what
        reads it is given r(x), so that the parts stay small. One that holds nowhere is as if it had not been said. Of a node
        that was moved before, the relation is that of the value it had since.
        """
        names = tuple(node.name for node in nodes)
        by_node = relation if isinstance(relation, Mapping) else dict.fromkeys(nodes, relation)
        relations = {node.name: its for node, its in by_node.items() if its is not None}
        if names:
            self._note("move", "", names[0], f"{detail}: {len(names)} values", names, relations=relations)

    def set_attribute(self, path: str, name: str, value: object) -> None:
        """Set a plain attribute of the layer at ``path``, such as the ``in_features`` of a layer whose weight changed.

        Of a module that only holds others, such as the ``num_heads`` of an attention, it is noted for ``graft``: nothing
        in a program reads it.
        """
        layer = attribute(self.program.module, path)
        if not isinstance(layer, nn.Module) or name in layer._parameters or name in layer._buffers:
            raise RewriteError(f"there is no layer at {path} with a plain attribute {name}")
        old = getattr(layer, name, None)
        if type(layer) is not Container:
            setattr(layer, name, value)
        self._note("set attribute", path, "", f"{name}: {old} -> {value}")

    def set_property(self, name: str, value: Any) -> None:
        """Set a property of the program, a plain JSON value; None takes it away.

        Raises RewriteError for a name that no installed package announces, and for a value that it cannot have.
        """
        before = self.program.properties
        after = {**before, name: value} if value is not None else {k: v for k, v in before.items() if k != name}
        self.program.module.assume(after)
        self._note("set property", "", name, f"{name}: {thawed(before.get(name))} -> {thawed(value)}")

    def sweep(self) -> None:
        """Take out of the module tree what nothing uses any more since its uses were removed.

        That is: layers that nothing calls; parameters whose last reader in the graph was removed; modules that held
        these and are left empty. Layers below a layer that goes and that are called by themselves stay where they are.
        """
        for node in [n for n in self._readers if not n.users]:
            self.remove(node)
        for path in self._gone:
            found = attribute(self.program.module, path)
            if isinstance(found, nn.Module) and not self._calls.of(path):
                self._sweep_layer(path, found)
            elif isinstance(found, torch.Tensor) and not self._is_used(path, found):
                self._take(path, "nothing reads it any more")
        self._gone.clear()
        self._repoint([n for n in self.graph.nodes if n.op == "get_attr"])

    def _sweep_layer(self, path: str, layer: nn.Module) -> None:
        called = {name: child for name, child in layer._modules.items() if self._calls.below(f"{path}.{name}")}
        if called:
            rest = Container().train(layer.training)
            rest._modules.update(called)
            self._put(path, rest)
            self._note("sweep", path, "", "nothing calls it any more, but layers below it", old=layer, new=rest)
        else:
            self._take(path, "nothing calls it any more")

    def _is_used(self, path: str, tensor: torch.Tensor) -> bool:
        """Whether the graph reads a tensor, under this name or another, or a layer that it calls holds it here."""
        reads = (n for n in self.graph.nodes if n.op == "get_attr")
        parts = path.split(".")
        return any(attribute(self.program.module, str(n.target)) is tensor for n in reads) or any(
            self._calls.of(".".join(parts[:i])) for i in range(1, len(parts))
        )

    def _take(self, path: str, why: str) -> None:
        """Take a module or tensor out of the tree, and what held it where that is left empty."""
        holder, name = self._parent(path)
        for held in (holder._modules, holder._parameters, holder._buffers):
            held.pop(name, None)
        holder._non_persistent_buffers_set.discard(name)
        self._note("sweep", path, "", why)
        if type(holder) is Container and not any((holder._modules, holder._parameters, holder._buffers)):
            self._take(path.rpartition(".")[0], "nothing is left in it")

    def set_literal(self, node: Node, argument: str, value: Argument, region: str = "") -> None:
        """Set an argument of an operator's call, by its name in the operator's schema, such as the sizes of a reshape.

        The node is one of the program's graph, or of a graph of the region at a path. Nodes in the argument stay those that
        it had. Raises RewriteError for another node, and where there is no such argument.
        """
        arguments = literal_arguments(node)
        if argument not in arguments:
            known = f"it has {', '.join(arguments)}" if arguments else "it calls no operator"
            raise RewriteError(f"{node.name} has no argument {argument}: {known}")
        old = arguments[argument]
        if [n for n in leaves(old) if isinstance(n, Node)] != [n for n in leaves(value) if isinstance(n, Node)]:
            raise RewriteError(f"{argument} of {node.name} reads other nodes then: literals alone can be set")
        set_argument(node, argument, value)
        if region:
            attribute(self.program.module, region).recompile()
            self._note("set attribute", region, "", f"graphs: {argument} of {node.name} is {value}, it was {old}")
            return
        self._sign(node, [node])
        self._note("set literal", "", node.name, f"{argument}: {old} -> {value}", (node.name,))

    @property
    def reshapes(self) -> bool:
        """Whether an edit may have changed the shape of a value."""
        return bool(self._reshaped) or any(c.kind in ("set parameter", "set literal") for c in self.changes)

    def follow(self) -> None:
        """Let the attributes of layers follow the sizes of parameters that were set: ``out_features`` and its like."""
        for path in dict.fromkeys(c.path.rpartition(".")[0] for c in self.changes if c.kind == "set parameter"):
            for name, size in followed(attribute(self.program.module, path)):
                self.set_attribute(path, name, size)

    def revalue(self) -> None:
        """Infer the values of edited nodes anew, and of all that follow where shapes changed.

        Raises RewriteError, by name, for the first node that does not fit what it is given now.
        """
        moved = set(self._reshaped)
        for node in self.graph.nodes:
            old = meta.VALUE.of(node)
            if node.op in ("call_function", "call_module") and (
                self._is_edited(node) or not moved.isdisjoint(node.all_input_nodes)
            ):
                meta.VALUE.set(node, self._refitted(node))
            elif node.op == "get_attr":
                found = attribute(self.program.module, str(node.target))
                if isinstance(found, torch.Tensor) and isinstance(old, torch.Tensor) and found.shape != old.shape:
                    meta.VALUE.set(node, old.new_empty(tuple(found.shape)))
            if _layout(old) != _layout(meta.VALUE.of(node)):
                moved.add(node)

    def _is_edited(self, node: Node) -> bool:
        """Whether a node, or the layer that it calls, was edited."""
        if len(self.changes) != self._seen:
            self._seen = len(self.changes)
            names = (name for c in self.changes for name in c.nodes)
            paths = {c.path for c in self.changes if c.kind != "set parameter"}
            tensors = {c.path for c in self.changes if c.kind == "set parameter"}
            shared = [names for names in names_of_tensors(self.program.module).values() if not tensors.isdisjoint(names)]
            holders = {name.rpartition(".")[0] for name in (*tensors, *(n for names in shared for n in names))}
            self._edited = frozenset(names), frozenset(paths | holders)
        return node.name in self._edited[0] or (node.op == "call_module" and node.target in self._edited[1])

    def _refitted(self, node: Node) -> Any:
        """The value of a node from what it is given now."""
        try:
            return self.value_of(node)
        except Exception as error:
            called = f"the layer at {node.target}" if node.op == "call_module" else str(node.target)
            raise RewriteError(f"{node.name} ({called}) does not fit what it is given now: {first_line(error)}") from error

    def _repoint(self, reads: Sequence[Node]) -> None:
        """Where code took its dtype or device from a parameter that is not there any more, another one gives it."""
        for node in reads:
            if attribute(self.program.module, str(node.target)) is None:
                like = meta.VALUE.of(node)
                if not gives_kind_alone(node):
                    raise RewriteError(
                        f"{node.target} goes with its layer, and {next(iter(node.users), node).name} reads it"
                    )
                named = self.program.module.named_parameters()
                other = next((n for n, p in named if (p.dtype, p.device) == (like.dtype, like.device)), None)
                if other is None:
                    raise RewriteError(f"{node.target} goes with its layer, and no other parameter has its dtype and device")
                home = str(node.target).rpartition(".")[0]
                self._calls.move(node, other)
                meta.VALUE.set(node, like.new_empty(tuple(self._tensor(other).shape)))
                self._note("repoint", home, node.name, f"takes dtype and device from {other}", (node.name,))

    def _map(self, compute: Compute, sources: Sequence[str]) -> ParameterMap:
        return ParameterMap(compute, tuple(self._origin(source) for source in sources))

    def _origin(self, source: str) -> str | ParameterMap:
        """What a source was before the pass; what came with a new module was nothing, and is what it is."""
        parts = source.split(".")
        came = any(".".join(parts[:i]) in self._came for i in range(1, len(parts) + 1))
        if source in self._maps or not came:
            return self._maps.get(source, source)
        return ParameterMap(Constant(self._tensor(source).detach()), ())

    def _tensor(self, path: str) -> torch.Tensor:
        found = attribute(self.program.module, path)
        for change in self.changes:  # or one that a layer held which was replaced
            if not isinstance(found, torch.Tensor) and change.old is not None and path.startswith(f"{change.path}."):
                found = attribute(change.old, path.removeprefix(f"{change.path}."))
        if not isinstance(found, torch.Tensor):
            raise RewriteError(f"there is no parameter or buffer {path}")
        return found

    def _hold(self, path: str, new: torch.Tensor) -> None:
        holder, name = self._parent(path)
        if not isinstance(holder, nn.Module):
            raise RewriteError(f"there is no layer at {path.rpartition('.')[0]}")
        kinds: list[dict[str, Any]] = [holder._parameters, holder._buffers]
        held = next((h for h in kinds if h.get(name) is not None), None)
        if held is not None:
            self._places.set(held, name, new)
        elif isinstance(new, nn.Parameter):
            holder._parameters[name] = new
        else:
            holder._buffers[name] = new

    def value_of(self, node: Node) -> Any:
        """The FakeTensor value of a node, computed from those of its inputs."""
        return fake_value(self.program.module, node, known=self.program.module.shapes)

    def _inserted(self, made: Node, near: Node, detail: str, layer: nn.Module | None) -> Node:
        self._calls.add(made)
        meta.inherit(made, near)
        if meta.WHOLE.of(near) and module_stack(near)[-1:] and module_stack(near)[-1][1] == near.target:
            meta.STACK.set(made, dict(list(meta.STACK.of(near).items())[:-1]))  # beside that layer, not in it
        meta.VALUE.set(made, self.value_of(made))
        self._sign(made, [near])
        path = str(made.target) if made.op == "call_module" else ""
        self._note("insert", path, made.name, detail, (made.name,), None, layer)
        return made

    def _note(
        self,
        kind: Kind,
        path: str,
        node: str,
        detail: str,
        nodes: tuple[str, ...] = (),
        old: nn.Module | None = None,
        new: nn.Module | None = None,
        map: ParameterMap | None = None,
        relations: Mapping[str, Relation] | None = None,
    ) -> None:
        self.changes.append(Change(kind, path, node, detail, old, new, nodes, map, relations=relations or {}))

    def _checked(self, node: Node, layer: nn.Module, reshape: bool) -> Any:
        """The value of a node if it called ``layer``, which must have the shape and dtype that it has now."""
        value = fake_value(self.program.module, node, known=self.program.module.shapes, layer=layer)
        old, new = _shapes(meta.VALUE.of(node)), _shapes(value)
        if old != new and not reshape:
            raise RewriteError(
                f"the new layer at {node.target} gives {new} where the old one gave {old}: "
                "replace_layer(..., reshape=True) where its readers are edited too"
            )
        return value

    def _sign(self, node: Node, sources: Sequence[Node]) -> None:
        mark: meta.Mark = {"pass": self.author, "from": tuple(s.name for s in sources)}
        meta.PROVENANCE.set(node, (*meta.PROVENANCE.of(node), mark))

    def _beside(self, path: str) -> str:
        while True:
            self._numbers[path] += 1
            beside = f"{path}_{self._numbers[path]}"
            if not self._exists(beside):
                return beside

    def _free(self, path: str) -> str:
        if self._exists(path):
            raise RewriteError(f"there is a module at {path} already")
        return path

    def _exists(self, path: str) -> bool:
        holder, name = self._parent(path)
        return holder is not None and hasattr(holder, name)

    def _parent(self, path: str) -> tuple[Any, str]:
        """What holds a path (None if nothing does), and the name there."""
        parent, _, name = path.rpartition(".")
        return attribute(self.program.module, parent) if parent else self.program.module, name

    def place(self, path: str) -> tuple[int, ...]:
        """How many modules stand before each part of a path, among those beside it: the order of the state_dict."""
        holder, places = self.program.module, []
        for part in path.split("."):
            places.append(list(holder._modules).index(part))
            holder = holder._modules[part]  # type: ignore[assignment]
        return tuple(places)

    def _put(self, path: str, layer: nn.Module, places: Sequence[int] = ()) -> None:
        holder: nn.Module = self.program.module
        *parents, name = path.split(".")
        for depth, part in enumerate(parents):
            if part not in holder._modules:
                self._places.put(holder, part, Container().train(holder.training))
                _move_last(holder._modules, places[depth : depth + 1])
            found = holder._modules[part]
            assert found is not None
            holder = found
        self._places.put(holder, name, layer)
        _move_last(holder._modules, places[len(parents) :])


class Calls:
    """The calls of each path in a graph, and the reads of tensors, in execution order, kept up to date by the edits."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._count = -1
        self._of: dict[str, dict[Node, None]] = {}
        self._reads: dict[str, dict[Node, None]] = {}

    def of(self, path: str) -> list[Node]:
        """The nodes that call ``path``."""
        self._see()
        return [n for n in self._of.get(path, ()) if n.target == path]

    def reads_below(self, path: str) -> list[Node]:
        """The nodes that read a tensor of the module at ``path``, or of one in it."""
        self._see()
        return [n for n in self._reads.get(path, ()) if str(n.target).startswith(f"{path}.")]

    def add(self, node: Node) -> None:
        """A node came."""
        self._count += 1
        self._take(node)

    def drop(self, node: Node) -> None:
        """A node is about to go."""
        self._count -= 1
        self._leave(node)

    def move(self, node: Node, path: str) -> None:
        """Let a node call, or read, another path."""
        self._leave(node)
        node.target = path
        self._take(node)

    def below(self, path: str) -> bool:
        """Whether a node calls ``path`` or a layer below it."""
        self._see()
        return any(p == path or p.startswith(f"{path}.") for p, nodes in self._of.items() if nodes)

    def _see(self) -> None:
        if self._count == len(self._graph.nodes):
            return
        self._count = len(self._graph.nodes)  # nodes came or went past the editor
        self._of, self._reads = {}, {}
        for node in self._graph.nodes:
            self._take(node)

    def _take(self, node: Node) -> None:
        for held, path in self._homes(node):
            held.setdefault(path, {})[node] = None

    def _leave(self, node: Node) -> None:
        for held, path in self._homes(node):
            held.get(path, {}).pop(node, None)

    def _homes(self, node: Node) -> Iterator[tuple[dict[str, dict[Node, None]], str]]:
        """Where a node is noted: a call under its path, a read under each module around the tensor."""
        if node.op == "call_module":
            yield self._of, str(node.target)
        elif node.op == "get_attr":
            parts = str(node.target).split(".")
            yield from ((self._reads, ".".join(parts[:i])) for i in range(1, len(parts)))


def _own(value: torch.Tensor, sources: Sequence[object]) -> torch.Tensor:
    """A tensor in memory of its own, in order: as it is, or a copy where it may share a source's."""
    value = value.detach()
    memory = value.untyped_storage()
    shared = [t.untyped_storage().data_ptr() for t in sources if isinstance(t, torch.Tensor)]
    whole = value.is_contiguous() and memory.nbytes() == value.numel() * value.element_size()
    return value if whole and memory.data_ptr() not in shared else value.clone()


def _move_last(held: dict[str, Any], place: Sequence[int]) -> None:
    """Move the last entry to a place further up, if one is given."""
    for name in list(held)[place[0] : -1] if place else ():
        held[name] = held.pop(name)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def _shapes(value: Any) -> Any:
    return pytree.tree_map(lambda v: (tuple(str(s) for s in v.shape), v.dtype) if isinstance(v, torch.Tensor) else v, value)


def _layout(value: Any) -> Any:
    def told(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        sizes = (*tensor.shape, *tensor.stride())
        return (*map(expression_of, sizes), tensor.dtype)

    return pytree.tree_map(told, value)
