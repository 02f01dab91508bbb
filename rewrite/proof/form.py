"""One form of a cut as a function: its nodes run on given border values and on tensors of its own, exactly or not."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from rewrite.graph.layers import ScaledDotProductAttention
from rewrite.graph.maps import ParameterMap
from rewrite.graph.nodes import attribute
from rewrite.graph.relation import Relation
from rewrite.numerics.exact import ExactArithmetic
from rewrite.numerics.modes import mode_readers
from rewrite.torch_private import TorchDispatchMode, _DropoutNd, pytree

from .cuts import Cut


@dataclass(frozen=True)
class Setting:
    """How a form is run: in exact arithmetic or its own dtype (or ``dtype``), training or not, in which contexts.

    The last of ``calls`` calls counts. Parameters are moved by normal noise of ``moved`` times their own scale, the same in
    both forms: what holds a value that follows from an old parameter shows itself. ``draw`` numbers the random numbers of a
    run, where ``seed`` stands for all else. ``silent`` sets the rate of each dropout to 0. ``nudged`` moves each number of
    the parameters by an ulp: what rounding at their size does. With ``apart`` a parameter that follows from old ones has a
    gradient of its own, "NAME itself", in place of its share of theirs: that is how a model is trained, and where it rounds.
    """

    exact: bool = True
    training: bool = False
    gradients: bool = True
    dtype: torch.dtype | None = None
    autocast: bool = False
    calls: int = 1
    moved: float = 0.0
    seed: int = 0
    draw: int = 0
    silent: bool = False
    nudged: bool = False
    apart: bool = False


@dataclass
class Outcome:
    """What one run of a form gave: output tensors, gradients by the name of a border or parameter, state afterwards.

    ``followed`` are buffers that are functions of old ones, after the run, with their maps; ``sources`` the old parameters
    whose gradient lacks what goes through parameters of which others have their own.
    """

    outputs: list[torch.Tensor]
    requires_grad: list[bool]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    followed: dict[str, tuple[ParameterMap, torch.Tensor]] = field(default_factory=dict)
    inputs: list[torch.Tensor] = field(default_factory=list)
    draws: int = 0
    drawn: tuple[Drawn, ...] = ()
    aliased: list[bool] = field(default_factory=list)
    sources: frozenset[str] = frozenset()


class Form:
    """The nodes of one side of a cut, with copies of the layers and tensors that they use.

    ``given``: what a border is given is this function of the value; ``wanted``: what counts of an output is this function
    of it. ``is_modal`` tells, once it has run, whether anything in it asked if it is in training.
    """

    def __init__(
        self,
        world: World,
        nodes: Sequence[Node],
        border: Sequence[Node],
        outputs: Sequence[Node],
        given: Mapping[Node, Relation] | None = None,
        wanted: Mapping[Node, Relation] | None = None,
    ) -> None:
        self.given = given or {}
        self.wanted = wanted or {}
        self.world = world
        self.nodes = nodes
        self.border = border
        self.outputs = outputs
        self.last_use = _last_uses(nodes, outputs)
        self.is_modal = False

    @classmethod
    def of(
        cls, world: World, nodes: Sequence[Node], border: Sequence[Node], outputs: Sequence[tuple[Node, Node]], side: int = 1
    ) -> Form:
        """The form whose outputs are the new nodes of some pairs, or the old ones for ``side`` 0."""
        return cls(world, nodes, border, [pair[side] for pair in outputs])

    @classmethod
    def both(cls, worlds: tuple[World, World], cut: Cut) -> tuple[Form, Form]:
        """Both forms of a cut as functions of the old border that give the new outputs."""
        given = {new: cut.related[new] for _, new in cut.border if new in cut.related}
        wanted = {old: cut.related[new] for old, new in cut.outputs if new in cut.related}
        old = cls(worlds[0], cut.old, cut.old_border, [old for old, _ in cut.outputs], wanted=wanted)
        return old, cls(worlds[1], cut.new, cut.new_border, [new for _, new in cut.outputs], given=given)

    def run(self, values: Sequence[torch.Tensor], setting: Setting) -> Outcome:
        """One forward, and if asked for one backward, of the form on border values; the program is left as it is."""
        tensors = TensorsOf(self.world, self.nodes, setting)
        inputs = [_given(value, setting) for value in values]
        handed = [_leaf(value, setting) for value in inputs]
        draws = SeededDraws(setting.seed + setting.draw)
        with ExitStack() as stack:
            for context in _contexts(setting, handed):
                stack.enter_context(context)
            stack.enter_context(draws)
            readers = stack.enter_context(mode_readers())
            for _ in range(setting.calls - 1):
                self.execute([value.detach() for value in handed], tensors, setting)
            found = self.execute(handed, tensors, setting)
            self.is_modal = self.is_modal or bool(readers)
            gradients = _gradients(found, handed, tensors.leaves, setting) if setting.gradients else {}
        return Outcome(
            [t.detach() for t in found],
            [t.requires_grad for t in found],
            gradients,
            tensors.state(),
            {name: (made, value.detach()) for name, (made, value) in tensors.followed.items()},
            [t.detach() for t in handed],
            draws.count,
            tuple(draws.drawn),
            [any(_share(t, v) for v in handed) for t in found],
            frozenset(tensors.sources),
        )

    def layers(self) -> Iterator[tuple[Node, nn.Module]]:
        """The calls of layers among the nodes."""
        for node in self.nodes:
            if node.op == "call_module":
                yield node, attribute(self.world.module, str(node.target))

    def execute(self, values: Sequence[torch.Tensor], tensors: TensorsOf, setting: Setting) -> list[torch.Tensor]:
        """The output tensors, node by node."""
        given = (_related(self.given.get(n), value) for n, value in zip(self.border, values, strict=True))
        env: dict[Node, Any] = dict(zip(self.border, given, strict=True))
        for node in self.nodes:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if node.op == "get_attr":
                env[node] = tensors.fetch(str(node.target))
            elif node.op == "call_module":
                env[node] = tensors.layer(str(node.target))(*args, **kwargs)
            elif node.op == "call_function":
                assert callable(node.target)
                env[node] = node.target(*args, **kwargs)
            else:
                raise KeyError(f"{node.name} is an input that the two programs do not share")
            for dead in self.last_use.get(node, ()):
                env.pop(dead, None)
        ends = (_related(self.wanted.get(n), env[n]) for n in self.outputs)
        return [t for end in ends for t in pytree.tree_leaves(end) if isinstance(t, torch.Tensor)]


def _related(relation: Relation | None, value: Any) -> Any:
    """The value, or what a relation makes of it: in float64, rounded once."""
    return value if relation is None else relation(value.double()).to(value.dtype)


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


Drawn = tuple[str, float, int]
"""One random draw: the operator, its rate, how many numbers."""


class SeededDraws(TorchDispatchMode):
    """Seeds the k-th random draw by (seed, k), so that two forms draw alike."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.count = 0
        self.drawn: list[Drawn] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = (kwargs or {}).get("generator") is not None
        if (
            torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
            and not own
            and not _drops_nothing(func, args, kwargs)
        ):
            torch.manual_seed(self.seed * 1_000_003 + self.count)
            self.count += 1
            found = func(*args, **(kwargs or {}))
            first = next((t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)), None)
            rate = next((a for a in args[1:] if isinstance(a, float)), 0.0)
            self.drawn.append((str(func), rate, 0 if first is None else first.numel()))
            return found
        return func(*args, **(kwargs or {}))


def _drops_nothing(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator drops with a rate of 0: which attention kernel runs, and so whether one draws, sizes decide."""
    arguments = getattr(getattr(func, "_schema", None), "arguments", ())
    place = next((i for i, argument in enumerate(arguments) if argument.name == "dropout_p"), None)
    if place is None:
        return False
    given = args[place] if place < len(args) else kwargs.get("dropout_p", arguments[place].default_value)
    return not given


@dataclass(frozen=True)
class World:
    """One of the two programs: its module, the names of its tensors, and the maps that lead to its parameters.

    ``origin`` is the world before the pass, in whose tensors the maps are.
    """

    module: nn.Module
    names: Mapping[int, str]
    maps: Mapping[str, ParameterMap] = field(default_factory=dict)
    origin: World | None = None

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self.names.values())

    @classmethod
    def of(cls, module: nn.Module, maps: Mapping[str, ParameterMap] | None = None, origin: World | None = None) -> World:
        """The world of a module; tied tensors go by their first name."""
        names: dict[int, str] = {}
        for name, tensor in [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]:
            names.setdefault(id(tensor), name)
        return cls(module, names, maps or {}, origin)


class TensorsOf:
    """Copies of the layers and tensors that some nodes use, each once; the leaves of the gradient by their names before.

    A parameter with a map is computed from copies of its sources, so that its gradient is theirs.
    """

    def __init__(
        self, world: World, nodes: Sequence[Node], setting: Setting, leaves: dict[str, torch.Tensor] | None = None
    ) -> None:
        self.world = world
        self.setting = setting
        self.memo: dict[int, Any] = {}
        self.leaves: dict[str, torch.Tensor] = {} if leaves is None else leaves
        self.buffers: dict[str, torch.Tensor] = {}
        self.sources: set[str] = set()
        self.followed: dict[str, tuple[ParameterMap, torch.Tensor]] = {}
        self.layers: dict[str, nn.Module] = {}
        for path in dict.fromkeys(str(n.target) for n in nodes if n.op in ("call_module", "get_attr")):
            self._adopt(path)

    def fetch(self, path: str) -> Any:
        value = attribute(self.world.module, path)
        return self.memo.get(id(value), value)

    def layer(self, path: str) -> nn.Module:
        return self.layers[path]

    def called(self, nodes: Sequence[Node]) -> dict[str, nn.Module]:
        """The layers that some nodes call, by path, in their order."""
        return {str(n.target): self.layer(str(n.target)) for n in nodes if n.op == "call_module"}

    def state(self) -> dict[str, torch.Tensor]:
        """The buffers; what another one follows from is only read to make that."""
        read = {source for made, _ in self.followed.values() for source in made.names}
        return {name: t.detach() for name, t in self.buffers.items() if name not in read}

    def _adopt(self, path: str) -> None:
        found = attribute(self.world.module, path)
        if isinstance(found, torch.Tensor):
            self._copy(path, found)
            return
        if not isinstance(found, nn.Module):
            return
        for name, tensor in [*found.named_parameters(), *found.named_buffers()]:
            self._copy(f"{path}.{name}", tensor)
        self.layers[path] = copy.deepcopy(found, self.memo).train(self.setting.training)
        if self.setting.silent:
            _silence(self.layers[path])

    def _copy(self, path: str, tensor: torch.Tensor) -> None:
        if id(tensor) in self.memo:
            return
        name = self.world.names.get(id(tensor), path)
        made = self.world.maps.get(name)
        if made is None:
            self.memo[id(tensor)] = self._leaf(name, tensor)
            return
        value = _cast(made.evaluate(self._source), self.setting)
        if self.setting.apart and isinstance(tensor, nn.Parameter):
            value = self.leaves[f"{name} itself"] = nn.Parameter(value.detach(), value.requires_grad)
            self.sources.update(made.names)
        self.memo[id(tensor)] = value
        if not isinstance(tensor, nn.Parameter):
            self.followed[name] = made, value

    def _source(self, name: str) -> torch.Tensor:
        origin = self.world.origin
        assert origin is not None
        tensor = attribute(origin.module, name)
        return self._leaf(origin.names.get(id(tensor), name), tensor)

    def _leaf(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor, made once for each name."""
        known = self.leaves if isinstance(tensor, nn.Parameter) else self.buffers
        if name not in known:
            made = _cast(tensor.detach(), self.setting).clone()
            if isinstance(tensor, nn.Parameter):
                moved = self._moved(made, name)
                made = nn.Parameter(one_ulp(moved) if self.setting.nudged else moved, tensor.requires_grad)
            known[name] = made
        return known[name]

    def _moved(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """An old parameter with noise of ``moved`` times its deviation (or 1), drawn from its name; a new one as it is."""
        moved, old = self.setting.moved, self.world.origin or self.world
        if not moved or name not in old.known or not tensor.is_floating_point() or not tensor.numel():
            return tensor
        deviation = float(tensor.double().std()) if tensor.numel() > 1 else 0.0
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        return tensor + moved * (deviation or 1.0) * projection(tensor, seed)


def one_ulp(value: torch.Tensor) -> torch.Tensor:
    """Each number of a tensor moved by one unit in the last place, up and down in turn."""
    if not value.is_floating_point():
        return value
    up = torch.arange(value.numel()).reshape(value.shape) % 2 == 0
    return torch.where(up.to(value.device), torch.nextafter(value, value + 1), torch.nextafter(value, value - 1))


def _silence(layer: nn.Module) -> None:
    """Set the rate of every dropout in a layer to 0."""
    for part in layer.modules():
        name = "p" if isinstance(part, _DropoutNd) else "dropout_p" if isinstance(part, ScaledDotProductAttention) else ""
        if name:
            setattr(part, name, 0.0)


def _cast(tensor: torch.Tensor, setting: Setting) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor if setting.dtype is None else tensor.to(setting.dtype)
    return tensor.double() if setting.exact else tensor


def _given(value: torch.Tensor, setting: Setting) -> torch.Tensor:
    return _cast(value.detach(), setting).clone()


def _leaf(value: torch.Tensor, setting: Setting) -> torch.Tensor:
    wants = setting.gradients and (value.is_floating_point() or value.is_complex())
    return value.clone().requires_grad_(wants)


def _contexts(setting: Setting, values: Sequence[torch.Tensor]) -> list[AbstractContextManager[Any]]:
    device = values[0].device.type if values else "cpu"
    contexts: list[AbstractContextManager[Any]] = [torch.random.fork_rng(devices=[])]
    contexts.append(torch.enable_grad() if setting.gradients else torch.no_grad())
    contexts.append(torch.autocast(device, torch.bfloat16) if setting.autocast else nullcontext())
    contexts.append(ExactArithmetic() if setting.exact else nullcontext())
    return contexts


def _gradients(
    outputs: Sequence[torch.Tensor], border: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor], setting: Setting
) -> dict[str, torch.Tensor | None]:
    """Vector-Jacobian products of a fixed projection of the outputs, by the place of a border or a parameter's name."""
    sources = {f"border {i}": t for i, t in enumerate(border) if t.requires_grad}
    sources.update({name: t for name, t in leaves.items() if t.requires_grad})
    loss: Any = 0.0
    for i, output in enumerate(outputs):
        if output.requires_grad:
            real = torch.view_as_real(output) if output.is_complex() else output
            loss = loss + (real * projection(real, setting.seed + i)).sum()
    if not isinstance(loss, torch.Tensor) or not sources:
        return dict.fromkeys(sources)
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    return dict(zip(sources, found, strict=True))


def projection(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of the shape, dtype and device of a tensor, the same for the same seed and shape; not to be changed."""
    return _normal(tuple(like.shape), seed).to(like.device, like.dtype)


@functools.lru_cache(maxsize=4)  # both forms of a part, and the parts like it, ask for the same ones
def _normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _last_uses(nodes: Sequence[Node], outputs: Sequence[Node]) -> dict[Node, list[Node]]:
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    dead: dict[Node, list[Node]] = {}
    for source, user in last.items():
        if source not in outputs:
            dead.setdefault(user, []).append(source)
    return dead
