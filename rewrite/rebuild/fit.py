"""A program put into a model that its class built: strictly, and compared, on random parameters and on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rewrite.axes.analyze import analyze
from rewrite.errors import RewriteError, named_line
from rewrite.graph.program import Program
from rewrite.graph.tree import Places, on_meta
from rewrite.lowering.compared import Distance, distance
from rewrite.numerics.probes import light_copy

from .candidates import Sizes
from .closed import Closed
from .makers import AnyMaker, ByConfig, Maker, maker_of
from .search import Edits, fitting
from .skeleton import shapes_of, without_values

_SPREAD = 0.05
"""By how much parameters are moved before outputs are compared: new ones are often 0, and would hide what reads them."""


@dataclass(frozen=True)
class Fitted:
    """How a program's class is built with the program's sizes."""

    maker: AnyMaker
    edits: Edits
    closed: Closed

    def module(self, program: Program) -> nn.Module:
        """The user's class, with the values of the program."""
        return filled(self.maker, self.edits, program, self.closed)


def fit_class(program: Program) -> Fitted:
    """The settings with which a program's own class is it. Raises RewriteError, with the reason, where there are none."""
    if on_meta(program.module):
        raise RewriteError("it has no values to compare: it is on the meta device")
    before = dict(program.origin.parameter_shapes)
    maker = maker_of(program.origin.home, before)
    moved, closed = scattered(program, seed=0), Closed.of(before, program.module.state_dict())

    def differs(edits: Edits) -> Distance:
        problem = maker.unwritable(edits) if isinstance(maker, ByConfig) else ""
        if problem:
            return Distance(float("inf"), f"and cannot be written: {problem}")
        try:
            return distance(moved, filled(maker, edits, moved, closed), ("eval",), gradients=False)
        except Exception as error:  # the class's own code, with settings that do not go together
            return Distance(float("inf"), f"and raises {named_line(error)}")

    shapes = {closed.name(name): shape for name, shape in shapes_of(program.module).items()}
    edits = fitting(maker, before, shapes, _sizes(program, closed), differs)
    return Fitted(maker, edits, closed)


def filled(maker: Maker, edits: Edits, program: Program, closed: Closed) -> nn.Module:
    """A model of the class with copies of the program's tensors, in its mode. Raises what the class raises."""
    with without_values():
        made = maker.build(edits)
    copies: dict[int, Any] = {}
    own = program.module.state_dict(keep_vars=True)
    state = {closed.name(name): _copy(tensor, copies) for name, tensor in own.items()}
    made.load_state_dict(state, strict=True, assign=True)
    for name, buffer in program.module.named_buffers():
        if name not in own:
            _follow(made, closed.name(name), buffer)
    return made.train(program.module.training)


def _copy(tensor: torch.Tensor, copies: dict[int, Any]) -> Any:
    """A copy, the same one for tensors that are tied."""
    if id(tensor) not in copies:
        own = tensor.detach().clone().contiguous()
        copies[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    return copies[id(tensor)]


def _follow(made: nn.Module, name: str, buffer: torch.Tensor) -> None:
    """A buffer that is not saved is what the class's code made of it, in the program's dtype and place."""
    holder = made.get_submodule(name.rpartition(".")[0]) if "." in name else made
    own = holder._buffers.get(name.rpartition(".")[2])
    if own is not None:
        holder._buffers[name.rpartition(".")[2]] = own.to(buffer.device, buffer.dtype)


def scattered(program: Program, seed: int) -> Program:
    """A copy of a program whose parameters are moved at random, so that none is 0, and no layer is the identity."""
    made = light_copy(program)
    places = Places(made.module)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for holder in list(made.module.modules()):
        for name, parameter in list(holder._parameters.items()):
            if parameter is None or id(parameter) in done or not parameter.is_floating_point():
                continue
            noise = _SPREAD * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            moved = nn.Parameter(parameter.detach() + noise.to(parameter), parameter.requires_grad)
            done.add(id(moved))
            places.set(holder._parameters, name, moved)
    return made


def _sizes(program: Program, closed: Closed) -> Sizes:
    inputs = [v for v in [*program.example_args, *program.example_kwargs.values()] if isinstance(v, torch.Tensor)]
    dims = {dim.size for dim in analyze(program).named.values() if dim.size > 1}
    images = tuple(sorted({size for v in inputs for size in v.shape[2:] if size > 1}))
    return Sizes(tuple(sorted(dims)), images, closed.gone)
