"""An optimizer's state, carried to the parameters that passes made of those it was of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.graph.maps import ParameterMap, Step
from rewrite.graph.program import Program
from rewrite.graph.renumber import renamed
from rewrite.graph.tree import names_of_tensors

Moments = dict[str, Any]
"""What an optimizer keeps for one parameter: tensors of its shape, and numbers such as ``step``."""
_NUMBER = re.compile(r"\d+")


def expand_state(optimizer_state: Mapping[str, Any], old: Program, new: Program) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer for the parameters of ``new``, from that for ``old``, of which passes made it.

    An entry of a new parameter that is c times an entry of an old one, which entries c_1, c_2, ... depend on, gets

        m' = c / (c_1^2 + c_2^2 + ...) m,    v' = (c / (c_1^2 + c_2^2 + ...))^2 v

    of the first moment m (``exp_avg``, ``momentum_buffer``) and the second v (names with ``sq``): what the gradients of the
    new entries are, where copies share one. New entries get 0. A parameter that is new, or depends on several old ones,
    starts without a state, as the optimizer lets it.

    The state numbers parameters as ``old.module.parameters()`` (and your model) lists them; where the optimizer has several
    groups, it has to know names (``AdamW([{"params": decayed.items()}, ...])``) or the state is keyed by them. The result
    is numbered by ``new.module.parameters()``; a parameter that is new joins the group of those of its kind.

    Raises RewriteError where ``new`` was not made of ``old`` in this process, and where the state does not tell which
    parameter an entry is of.
    """
    steps = _between(old, new)
    names, ours = _names(old), _names(new)
    by_name, groups = _named(optimizer_state, names, old)
    for step in steps:
        by_name = _carried(by_name, step)
        groups = [[renamed(name, step.names) for name in group] for group in groups]
    shapes = {name: tuple(new.module.get_parameter(name).shape) for name in ours}
    _tell_of_those_left(by_name, shapes)
    kept = {name: value for name, value in by_name.items() if name in shapes and _fits(value, shapes[name])}
    return _numbered(optimizer_state, kept, _regrouped(groups, ours))


def _between(old: Program, new: Program) -> Sequence[Step]:
    """The steps from one program to the other."""
    count = len(old.lineage)
    same = len(old.history) <= len(new.history) and all(a is b for a, b in zip(old.lineage, new.lineage, strict=False))
    if not same or count > len(new.lineage) or (len(new.history) > len(old.history) and count == len(new.lineage)):
        raise RewriteError(
            "the state cannot be carried: the second program was not made of the first by passes in this process "
            "(a file does not hold how parameters follow from each other); apply the passes to the first again"
        )
    return new.lineage[count:]


def _names(program: Program) -> list[str]:
    """The parameters as an optimizer lists them: tied ones once."""
    return [name for name, _ in program.module.named_parameters()]


# ---- which parameter an entry is of


def _named(state: Mapping[str, Any], names: Sequence[str], old: Program) -> tuple[dict[str, Moments], list[list[str]]]:
    """The state by name, and the names in each group."""
    groups = [list(group.get("param_names") or group["params"]) for group in state["param_groups"]]
    flat = [key for group in groups for key in group]
    if flat and all(isinstance(key, str) for key in flat):
        found = [[_known(str(key), names, old) for key in group] for group in groups]
    elif len(groups) == 1:
        found = [_trained(groups[0], names, old)]
    else:
        raise RewriteError(
            f"the state has {len(groups)} groups and no names, which does not tell what its entries are of: give the "
            "optimizer model.named_parameters() instead of parameters, in each group"
        )
    keys = [key for group in state["param_groups"] for key in group["params"]]
    by_key = dict(zip(keys, [name for group in found for name in group], strict=True))
    return {by_key[key]: dict(value) for key, value in state["state"].items()}, found


def _known(name: str, names: Sequence[str], old: Program) -> str:
    """A name as the program has it: a tied parameter may be called by another one."""
    if name in names:
        return name
    for group in names_of_tensors(old.module).values():
        if name in group and group[0] in names:
            return group[0]
    raise RewriteError(f"the state is of {name}, which is no parameter of the first program")


def _trained(keys: Sequence[Any], names: Sequence[str], old: Program) -> list[str]:
    """The names of a single group's parameters: all of them, or those that are trained."""
    trained = [name for name in names if old.module.get_parameter(name).requires_grad]
    for found in (list(names), trained):
        if len(found) == len(keys):
            return found
    raise RewriteError(
        f"the state is of {len(keys)} parameters, and the first program has {len(names)}, {len(trained)} of which are "
        "trained: give the optimizer model.named_parameters(), so that the state holds names"
    )


# ---- one step


def _carried(state: Mapping[str, Moments], step: Step) -> dict[str, Moments]:
    """The state after one pass."""
    before = {renamed(name, step.names): value for name, value in state.items()}
    after = {name: value for name, value in before.items() if name not in step.maps}
    for name, found in step.maps.items():
        source = found.names[0] if found is not None and len(found.names) == 1 else ""
        if found is not None and source in before:
            made = _moments(found, before[source])
            if made is not None:
                after[name] = made
    return after


def _moments(found: ParameterMap, old: Moments) -> Moments | None:
    """What is kept for a parameter that follows from another one; None where it is no multiple of entries of it."""
    like = next((v for v in old.values() if isinstance(v, torch.Tensor) and v.dim()), None)
    if like is None:
        return dict(old)
    linear = _linear(found, like)
    c = linear(torch.ones_like(like, dtype=torch.float64))
    squares = _adjoint(linear, c, like)
    scale = torch.where(squares > 0, 1 / squares, 0)
    if not _selects(linear, squares, like):
        return None
    made = dict(old)
    for key, value in old.items():
        if isinstance(value, torch.Tensor) and value.shape == like.shape:
            wide = value.detach().double()
            moved = c * linear(wide * scale * scale) if "sq" in key else linear(wide * scale)
            made[key] = moved.to(value.dtype)
    return made


def _linear(found: ParameterMap, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A map without what it adds, such as the values of new entries."""
    zero = found.evaluate(lambda name: torch.zeros_like(like, dtype=torch.float64))
    return lambda value: found.evaluate(lambda name: value) - zero


def _adjoint(linear: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The transpose of a linear map, of a value of its output's shape."""
    with torch.enable_grad():
        given = torch.zeros_like(like, dtype=torch.float64).requires_grad_()
        result = linear(given)
        if not result.requires_grad:
            return torch.zeros_like(given).detach()
        (gradient,) = torch.autograd.grad(result, given, value.detach())
    return gradient.detach()


def _selects(linear: Callable[[torch.Tensor], torch.Tensor], squares: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether each new entry is a multiple of one old one: then the transpose undoes the map up to the squares."""
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
    return torch.allclose(_adjoint(linear, linear(probe), like), squares * probe, atol=1e-9) and torch.allclose(
        linear(2 * probe), 2 * linear(probe), atol=1e-9
    )


# ---- the new numbering


def _fits(value: Moments, shape: tuple[int, ...]) -> bool:
    return all(not isinstance(v, torch.Tensor) or not v.dim() or tuple(v.shape) == shape for v in value.values())


def _tell_of_those_left(state: Mapping[str, Moments], shapes: Mapping[str, tuple[int, ...]]) -> None:
    left = [name for name in shapes if name in state and not _fits(state[name], shapes[name])]
    if left:
        warnings.warn(f"{', '.join(left[:3])} start without a state: what is kept for them is of other shapes", stacklevel=3)


def _regrouped(groups: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """Which parameters each group has now: those that it had, and new ones of the same kind, in the program's order."""
    home = {name: i for i, group in enumerate(groups) for name in group}
    kinds = {_NUMBER.sub("*", name): i for name, i in home.items()}
    last = {_NUMBER.sub("*", name).rpartition(".")[2]: i for name, i in home.items()}
    found: list[list[str]] = [[] for _ in groups]
    for name in names:
        kind = _NUMBER.sub("*", name)
        if name in home or len(groups) == 1 or kind in kinds or kind.rpartition(".")[2] in last:
            place = home.get(name, kinds.get(kind, last.get(kind.rpartition(".")[2], 0)))
            found[place].append(name)
        else:
            raise RewriteError(f"{name} is new, and no parameter of its kind tells in which group it belongs")
    return found


def _numbered(state: Mapping[str, Any], kept: Mapping[str, Moments], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    keyed = any(isinstance(key, str) for group in state["param_groups"] for key in group["params"])
    keys = dict(_keys(groups, keyed))
    made = []
    for group, names in zip(state["param_groups"], groups, strict=True):
        own = {**group, "params": [keys[name] for name in names]}
        if "param_names" in group:
            own["param_names"] = list(names)
        made.append(own)
    return {**state, "state": {keys[name]: kept[name] for name in keys if name in kept}, "param_groups": made}


def _keys(groups: Sequence[Sequence[str]], keyed: bool) -> Iterator[tuple[str, Any]]:
    flat = [name for group in groups for name in group]
    yield from ((name, name if keyed else i) for i, name in enumerate(flat))
