"""What a user's class has to take of a program's edits, and where: each has a place in it, or is refused by name.

The history says what was done; what a later pass undid (a layer that is gone, one that is back at its old path) counts no
more. A layer fits at the path of a module of the user's, or right before or after one, together as an ``nn.Sequential``.
Where a module was taken out, something has to stand that the class can call: see ``absent``.
"""

from __future__ import annotations

import ast
import inspect
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Node

from rewrite.errors import RewriteError
from rewrite.graph import meta
from rewrite.graph.history import Record, Site
from rewrite.graph.nodes import attribute, module_key, module_stack
from rewrite.graph.program import Program

_LAYER = "layer"
"""The name of the user's own layer in an ``nn.Sequential`` with others."""


class Gone(NamedTuple):
    """Of a module that was taken out: whether its readers read its input now, and which children follow in its place."""

    is_bypassed: bool
    left: tuple[str, ...]


@dataclass
class Fit:
    """Where everything goes.

    ``swapped``: the paths at which the program's layer replaces the user's module, with the children that the module called
    after its layer. ``before`` and ``after``: the paths of layers that stand right before or after a module. ``attributes``:
    values of plain attributes by path and name. ``resized``: parameters of another shape, or that were not there.
    ``modules``: those of the swapped paths whose layer stands for all that a module did. ``adapted``: those of them whose
    layer needs to be told which of a call's arguments is its own. ``gone``: the outermost modules that were taken out.
    """

    swapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)
    after: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)
    resized: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
    adapted: set[str] = field(default_factory=set)
    gone: dict[str, Gone] = field(default_factory=dict)

    def renamed(self, name: str) -> str:
        """The name in the user's class of a tensor of the program."""
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            path, rest = ".".join(parts[:i]), parts[i:]
            home = next((h for beside in (self.before, self.after) for h, paths in beside.items() if path in paths), None)
            if home is not None:
                return ".".join([home, path.rpartition(".")[2], *rest])
            if path in {*self.before, *self.after, *self.adapted} or (
                self.swapped.get(path) and rest[0] not in self.swapped[path]
            ):
                return ".".join([path, _LAYER, *rest])
        return name


def fit(program: Program, model: nn.Module) -> Fit:
    """Where a program's edits go in a model. Raises RewriteError, by name, for the first that has no place."""
    fitting, refused = _Fitting(program, model), []
    for record in program.history:
        fitting.makes_way = any(fitting.can_go(site) for site in record.changes)
        for site in record.changes:
            try:
                fitting.take(record, site)
            except RewriteError as error:
                refused.append((site, error))
    if refused:  # a layer of the user's that is gone says more than an operator that is new
        gone = (
            error for site, error in refused if site.kind == "remove" and isinstance(attribute(model, site.path), nn.Module)
        )
        raise next(gone, refused[0][1])
    fitting.fit.gone = fitting.gone()
    return fitting.fit


class _Fitting:
    """Goes through a history, edit by edit."""

    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.model, self.calls, self.fit = program, model, Calls.of(program), Fit()
        sites = [site for record in program.history for site in record.changes]
        self.inserted = {site.path for site in sites if site.kind == "insert"}
        self.sized = {site.path for site in sites if site.kind == "set attribute"}
        self.modules = {site.path for site in sites if site.kind == "replace module"}
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.leaving: list[tuple[Record, Site]] = []
        self.makes_way = False
        self.heirs: dict[str, set[str]] = {}
        for site in sites:
            if site.kind == "rewire":
                self.heirs.setdefault(_old(site), set()).add(site.path)

    def take(self, record: Record, site: Site) -> None:
        """Find the place of one edit."""
        match site.kind:
            case "set property" | "repoint" | "move":
                pass
            case "sweep":
                pass  # what goes was called, or read: the edit that removed that is judged
            case "set parameter":
                self.fit.resized.add(site.path)
            case "set attribute":
                self._attribute(record, site)
            case "replace layer":
                self._swap(site.path)
            case "replace module":
                self._swap(site.path)
                self.fit.modules.update([site.path] if site.path in self.fit.swapped else [])
            case "insert" | "remove" if site.path in self.modules:
                pass  # how a module was replaced
            case "insert":
                self._insert(record, site)
            case "remove" if site.path in self.calls.by_path or site.path in self.inserted:
                pass  # it is back, or came by an edit itself
            case "remove" if self.can_go(site):
                self.leaving.append((record, site))
            case "rewire" if self._is_settled(site.path) or (self.makes_way and _old(site) not in self.nodes):
                pass  # what was read goes with a module, what is read in its place was there
            case "renumber":
                raise RewriteError(
                    f"pass {record.text} put blocks between those of {site.path}: your instance has as many as it had; save "
                    "the program, to a folder of its own library or as .pt2"
                )
            case "set literal" if self._follows_a_size(site.path):
                pass  # the user's code computes it from the attribute
            case _:
                raise _between(record, site)

    def _insert(self, record: Record, site: Site) -> None:
        path = site.path
        if path not in self.calls.by_path:
            if path in self.nodes:
                raise _between(record, site)
            return  # a later edit took it out again
        if isinstance(attribute(self.model, path), nn.Module):
            self._swap(path)
            return
        found = self._beside(path)
        if found is None:
            raise RewriteError(
                f"{path}, which pass {record.text} inserted, stands alone between no two modules of your class that could "
                "hold it: save the program as .pt2"
            )
        beside, home = found
        if self._swappable(home) or path.rpartition(".")[2] == _LAYER or not _takes_one(attribute(self.model, home)):
            raise _between(record, site)
        paths = beside.setdefault(home, [])
        paths.insert(0 if beside is self.fit.before else len(paths), path)

    def _beside(self, path: str) -> tuple[dict[str, list[str]], str] | None:
        """After which module a layer stands alone, or before which."""
        calls = self.calls.by_path[path]
        if len(calls) != 1 or len(calls[0].all_input_nodes) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
            return None
        (call,) = calls
        (source,) = call.all_input_nodes
        home = self._home(source, self.fit.after)
        if home is not None and [*source.users] == [call]:
            return self.fit.after, home
        users = [*call.users]
        home = self._home(users[0], self.fit.before) if len(users) == 1 and users[0].args == (call,) else None
        return None if home is None else (self.fit.before, home)

    def _home(self, node: Node, beside: Mapping[str, Sequence[str]]) -> str | None:
        """The module of the user's that a node is the one call of, or that already has this layer beside it."""
        path = str(node.target) if node.op == "call_module" else ""
        known = next((home for home, paths in beside.items() if path in paths), None)
        if known is not None:
            return known
        single = len(self.calls.by_path.get(path, ())) == 1 and not node.kwargs
        return path if single and isinstance(attribute(self.model, path), nn.Module) else None

    def _swap(self, path: str) -> None:
        if path in self.calls.by_path:  # else a later edit took it out, and is judged itself
            self.fit.swapped[path] = self._swappable(path)

    def _swappable(self, path: str) -> tuple[str, ...]:
        """The children that the module at ``path`` calls after its layer; raises RewriteError if it does anything else."""
        module = attribute(self.model, path)
        if not isinstance(module, nn.Module):
            base = path.rpartition("_")[0]
            if isinstance(attribute(self.model, base), nn.Module):
                raise RewriteError(
                    f"{base} is a module called several times, of which one call was edited: your class "
                    "cannot hold that; edit all its calls, or save the program as .pt2"
                )
            raise RewriteError(f"{path} is no module of your model but a call inside its code: save the program as .pt2")
        if type(module) is type(attribute(self.program.module, path)):
            return ()
        tails = {() if meta.WHOLE.of(n) else self.calls.after(n) for n in self.calls.by_path.get(path, ())}
        tail = tails.pop() if len(tails) == 1 else None
        if tail is None or (tail and not _takes_one(module)):
            raise RewriteError(
                f"{path} is a {type(module).__name__}, which does more than the layer that was replaced in it: "
                "save the program as .pt2"
            )
        return tail

    def _attribute(self, record: Record, site: Site) -> None:
        name, _, change = site.detail.partition(": ")
        module = attribute(self.model, site.path)
        if site.path in self.inserted and not isinstance(module, nn.Module):
            return
        if not isinstance(module, nn.Module) or not hasattr(module, name):
            raise RewriteError(
                f"pass {record.text} set {name} at {site.path}, which your class has not there: save the program as .pt2"
            )
        held = attribute(self.program.module, site.path)
        value = getattr(held, name, None)
        self.fit.attributes[site.path, name] = _plain(change.rpartition(" -> ")[2]) if value is None else value

    def can_go(self, site: Site) -> bool:
        """Whether a module of the user's was taken out, and no layer that came by an edit took over what it gave."""
        is_module = site.kind == "remove" and isinstance(attribute(self.model, site.path), nn.Module)
        return is_module and not self._heirs(site.path) & self.inserted

    def _heirs(self, path: str) -> set[str]:
        """The nodes whose values are read in place of what a layer gave."""
        return self.heirs.get(path.replace(".", "_"), set())

    def gone(self) -> dict[str, Gone]:
        """The outermost modules that were taken out; the children that are left are in the order of their calls."""
        if not self.leaving:
            return {}
        sites = [site for record in self.program.history for site in record.changes if site.kind in ("remove", "sweep")]
        alive = {*self.calls.by_path, *(path for node in self.program.graph.nodes for _, path, _ in module_stack(node))}
        alive |= {path[:i] for path in alive for i, letter in enumerate(path) if letter == "."}
        found: dict[str, Gone] = {}
        for path in sorted({site.path for site in sites} - self.inserted - self.modules - {*self.calls.by_path}):
            module = attribute(self.model, path)
            if not isinstance(module, nn.Module) or _within(path, found):
                continue
            left = (
                [p.removeprefix(f"{path}.") for p in self.calls.by_path if p.startswith(f"{path}.")] if path in alive else []
            )
            if left and self._heirs(path) and {*left} <= {*dict(module.named_children())}:
                found[path] = Gone(True, tuple(left))
            elif not left:
                parts = path.split(".")
                around = (".".join(parts[: i + 1]) for i in range(len(parts)))
                outer = next(p for p in around if p == path or (p not in alive and _is_called(attribute(self.model, p))))
                found[outer] = Gone(bool(self._heirs(outer)), ())
        for record, site in self.leaving:
            if not _within(site.path, found) and not any(path.startswith(f"{site.path}.") for path in found):
                raise _between(record, site)
        return found

    def _is_settled(self, name: str) -> bool:
        """Whether the node that some uses were rewired to is gone, or came by an edit that is judged itself."""
        node = self.nodes.get(name)
        return node is None or name in self.inserted or (node.op == "call_module" and str(node.target) in self.inserted)

    def _follows_a_size(self, name: str) -> bool:
        """Whether a node stands in a module of the user's of which an attribute was set."""
        node = self.nodes.get(name)
        return node is None or any(path in self.sized for _, path, _ in module_stack(node))


def _old(site: Site) -> str:
    """The node that was read before some uses were rewired."""
    return site.detail.rpartition(" uses of ")[2]


def _within(path: str, others: Collection[str]) -> bool:
    """Whether a path is one of others, or in one of them."""
    return path in others or any(path[:i] in others for i, letter in enumerate(path) if letter == ".")


def _is_called(module: Any) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _takes_one(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _plain(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise RewriteError(f"the history tells no plain value: {text}") from None


def _between(record: Record, site: Site) -> RewriteError:
    if site.kind == "remove":
        return RewriteError(
            f"pass {record.text} took {site.path} out, which the code of your class still calls: save the program as .pt2"
        )
    return RewriteError(
        f"pass {record.text} changed the graph between layers ({site.kind} at {site.path}): "
        "that cannot be put into your class; save the program as .pt2"
    )


@dataclass(frozen=True)
class Calls:
    """The layer calls of a program by path, and all nodes of each module call by its key."""

    by_path: Mapping[str, Sequence[Node]]
    by_key: Mapping[str, Sequence[Node]]

    @classmethod
    def of(cls, program: Program) -> Calls:
        by_path: dict[str, list[Node]] = {}
        by_key: dict[str, list[Node]] = {}
        for node in program.graph.nodes:
            if node.op == "call_module":
                by_path.setdefault(str(node.target), []).append(node)
            for key, _, _ in module_stack(node):
                by_key.setdefault(key, []).append(node)
        return cls(by_path, by_key)

    def after(self, call: Node) -> tuple[str, ...] | None:
        """The names of the children that follow a layer, one on the other, in its module's call; None if there is more.

        A child that is called twice is more: a sequence has one place for it.
        """
        path = str(call.target)
        chain = [call]
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            if user.op != "call_module" or str(user.target).rpartition(".")[0] != path or user.args != (chain[-1],):
                break
            chain.append(user)
        names = tuple(str(n.target).rpartition(".")[2] for n in chain[1:])
        inside = self.by_key.get(module_key(call), ())
        return names if set(inside) == set(chain) and len(set(names)) == len(names) else None


def joined(fit: Fit, path: str, own: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """The user's layer at ``path`` with what stands right before and after it."""
    named = [(p.rpartition(".")[2], layers[p]) for p in fit.before.get(path, ())]
    named += [(_LAYER, own), *((p.rpartition(".")[2], layers[p]) for p in fit.after.get(path, ()))]
    return nn.Sequential(OrderedDict(named))


def followed(layer: nn.Module, tail: tuple[str, ...]) -> nn.Module:
    """The layer, and after it those of its children that the module called there."""
    if not tail:
        return layer
    after = {name: layer.get_submodule(name) for name in tail}
    for name in tail:
        delattr(layer, name)
    return nn.Sequential(OrderedDict([(_LAYER, layer), *after.items()]))


def unplaced(program: Program, made: nn.Module, fit: Fit) -> Iterator[str]:
    """Parameters of the program that the grafted model does not have, or in another shape, and the other way round."""
    ours = {fit.renamed(n): p.shape for n, p in program.module.named_parameters(remove_duplicate=False)}
    theirs = {n: p.shape for n, p in made.named_parameters(remove_duplicate=False)}
    yield from (f"{name} of the program has no place in it" for name in ours if name not in theirs)
    yield from (f"{name} of your class is no parameter of the program any more" for name in theirs if name not in ours)
    for name in ours:
        if name in theirs and ours[name] != theirs[name]:
            yield f"{name} has shape {tuple(theirs[name])} in it and {tuple(ours[name])} in the program"
