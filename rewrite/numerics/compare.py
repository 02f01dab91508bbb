"""Comparing two programs or modules: outputs, gradients and buffer updates, in both modes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.graph.copies import copied
from rewrite.graph.program import LayerGraph, Program
from rewrite.graph.tree import on_meta
from rewrite.torch_private import pytree

from .exact import ExactArithmetic
from .guard import ReadOnly, WrittenInPlaceError, sharing
from .modes import mode_readers
from .randomness import seeded

T = TypeVar("T")
Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = ("eval", "train")
TOLERANCE = 1e-10
"""The largest relative error, in exact arithmetic, of what is called the same."""
EXTREME = 6e4
"""Values from here on may be a mask's, as float16's -65504: see ``relative_error``."""
FLOOR = 1e-3
"""A gradient counts relative to its own size, or to this share of the largest gradient where that is more."""


@dataclass(frozen=True)
class Run:
    """One forward and backward pass: outputs, gradients by parameter name, buffers afterwards.

    ``modal`` is whether anything that ran asked for its mode; where nothing did, the other mode gives the same run.
    """

    outputs: tuple[torch.Tensor, ...]
    gradients: Mapping[str, torch.Tensor | None]
    buffers: Mapping[str, torch.Tensor]
    modal: bool = True


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart: relative errors of outputs, gradients and buffers, and where the worst is.

    ``modal`` is whether either run depends on its mode.
    """

    outputs: float
    gradients: float
    buffers: float
    worst_gradient: str = ""
    problem: str = ""
    note: str = ""
    modal: bool = True

    @property
    def largest(self) -> float:
        return float("inf") if self.problem else max(self.outputs, self.gradients, self.buffers)


@dataclass(frozen=True)
class Comparison:
    """The result of ``verify``: the difference in each mode, in exact arithmetic and in the models' own dtype."""

    exact: Mapping[str, Difference]
    native: Mapping[str, Difference]
    tolerance: float = field(default=TOLERANCE)

    @property
    def same(self) -> bool:
        """Whether both compute the same up to rounding, in both modes, gradients and buffers included."""
        return all(d.largest <= self.tolerance for d in self.exact.values())

    @property
    def bitwise(self) -> bool:
        """Whether they agree bit for bit in the models' own dtype."""
        return all(d.largest == 0 for d in self.native.values())

    def __bool__(self) -> bool:
        return self.same

    def __str__(self) -> str:
        lines = []
        for mode, exact in self.exact.items():
            native = self.native[mode]
            lines.append(
                f"{mode}: outputs {exact.outputs:.1e} gradients {exact.gradients:.1e} buffers "
                f"{exact.buffers:.1e} (own dtype {native.outputs:.1e} {native.gradients:.1e}) {exact.problem}"
            )
        return ("same" if self.same else "DIFFERENT") + "\n" + "\n".join(lines)


def verify(
    a: Program | nn.Module,
    b: Program | nn.Module,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Compare two programs or modules on one input, in eval and in training.

    Errors are relative, ``max|a - b| / max|a|``, over outputs, gradients (of a random projection of the outputs) of
    the parameters both have, and buffers afterwards. "Exact" runs both in float64 throughout. Neither is changed.
    Without ``args`` and ``kwargs`` the example inputs of a program are used.

    Raises RewriteError when there are no inputs, or a tensor is on the meta device.
    """
    args, kwargs = _inputs(a, b, args, kwargs)
    first, second = _module(a), _module(b)
    if on_meta(first, second):
        raise RewriteError("nothing can be verified on the meta device: move the model to a real one")
    by_layer = isinstance(first, LayerGraph) and isinstance(second, LayerGraph)
    exact: dict[str, Difference] = {}
    native: dict[str, Difference] = {}
    for table, is_exact in ((exact, True), (native, False)):
        for mode in MODES:
            if mode == "train" and not table["eval"].modal:
                table[mode] = table["eval"]
                continue
            left = run(first, args, kwargs, mode, exact=is_exact, seed=seed, by_layer=by_layer)
            right = run(second, args, kwargs, mode, exact=is_exact, seed=seed, by_layer=by_layer)
            table[mode] = difference(left, right)
    return Comparison(exact, native)


def _module(program: Program | nn.Module) -> nn.Module:
    return program.module if isinstance(program, Program) else program


def _inputs(
    a: Any, b: Any, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args is None and kwargs is None:
        for program in (a, b):
            if isinstance(program, Program):
                return tuple(program.example_args), dict(program.example_kwargs)
        raise RewriteError("verify needs inputs to compare two modules on: args=(x,)")
    return tuple(args or ()), dict(kwargs or {})


def run(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    *,
    exact: bool,
    seed: int = 0,
    gradients: bool = True,
    by_layer: bool = True,
) -> Run:
    """One forward and backward pass on a copy of ``module``, seeded; in float64 throughout where ``exact``.

    The random layers of a layer graph are seeded each by itself where ``by_layer``; otherwise, and in any other module,
    the order of draws counts. The copy shares the memory of the parameters, unless the module writes into them.
    """
    how = _How(mode, exact, seed, gradients, by_layer)
    return on_copy(module, lambda copied: _run(copied, args, kwargs, how))


def on_copy(module: nn.Module, action: Callable[[nn.Module], T]) -> T:
    """The result of ``action`` on a copy that shares the memory of the parameters; on a full one if it writes there."""
    try:
        copied = clone(module, sharing(module))
        with ReadOnly(module.parameters()):
            return action(copied)
    except WrittenInPlaceError:
        return action(clone(module))


@dataclass(frozen=True)
class _How:
    """How to run a module; the fields are the arguments of ``run``."""

    mode: Mode
    exact: bool
    seed: int
    gradients: bool
    by_layer: bool


def _run(copied: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], how: _How) -> Run:
    copied.train(how.mode == "train")
    args, kwargs = copy.deepcopy((tuple(args), dict(kwargs)))
    if how.exact:
        copied = copied.double()
        args, kwargs = pytree.tree_map(_double, (args, kwargs))
    draws = seeded(copied, how.seed) if how.by_layer and isinstance(copied, LayerGraph) else _seeded_globally(how.seed)
    with draws, ExactArithmetic() if how.exact else nullcontext(), mode_readers() as readers:
        outputs = tuple(tensors(copied(*args, **kwargs)))
        found = _gradients(copied, outputs, how.seed) if how.gradients else {}
    return Run(tuple(o.detach() for o in outputs), found, dict(copied.named_buffers()), bool(readers))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def clone(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that also takes modules whose attributes are results of a computation (weight norm by hooks)."""
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copied(module, memo)


@contextmanager
def _seeded_globally(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors of an output, whatever containers hold them."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _gradients(module: nn.Module, outputs: Sequence[torch.Tensor], seed: int) -> dict[str, torch.Tensor | None]:
    """Gradients of a fixed random projection of the outputs."""
    loss: Any = 0.0
    for i, output in enumerate(outputs):
        if output.requires_grad and output.is_floating_point():
            generator = torch.Generator().manual_seed(seed + i)
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (output * weights.to(output)).sum()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not isinstance(loss, torch.Tensor) or not named:
        return {}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def difference(a: Run, b: Run, names: Sequence[str] | None = None) -> Difference:
    """How far run ``b`` is from run ``a``; gradients of ``names`` only, by default of the parameters both have."""
    if len(a.outputs) != len(b.outputs):
        return Difference(0, 0, 0, problem=f"{len(a.outputs)} outputs against {len(b.outputs)}")
    for x, y in zip(a.outputs, b.outputs, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return Difference(0, 0, 0, problem=f"an output {tuple(x.shape)} {x.dtype} against {tuple(y.shape)} {y.dtype}")
    shared = [n for n in a.gradients if n in b.gradients and (names is None or n in names)]
    unequal = [n for n in shared if not _equal(a.gradients[n], b.gradients[n])]
    given = (g for g in a.gradients.values() if unequal and g is not None and g.numel())
    scale = max((float(g.abs().max()) for g in given), default=0.0)
    errors = {n: _gradient_error(a.gradients[n], b.gradients[n], scale) for n in unequal}
    worst = max(errors, key=lambda n: errors[n], default="")
    buffers = [
        relative_error(t, b.buffers[n]) for n, t in a.buffers.items() if n in b.buffers and b.buffers[n].shape == t.shape
    ]
    return Difference(
        max(map(relative_error, a.outputs, b.outputs), default=0.0),
        errors.get(worst, 0.0),
        max(buffers, default=0.0),
        worst,
        modal=a.modal or b.modal,
    )


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype is b.dtype and torch.equal(a, b))


def _gradient_error(a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    """Relative to its own size, or to a share of the largest gradient: that of a key's bias is rounding alone."""
    if a is None or b is None:
        given = a if a is not None else b
        return 0.0 if given is None or not bool(given.any()) else float("inf")
    error = relative_error(a, b)
    own = float(a.abs().max()) if a.numel() else 0.0
    return error * (own or 1.0) / max(own, FLOOR * scale) if 0 < error < math.inf and scale else error


def relative_error(a: torch.Tensor, b: torch.Tensor, least: float = 0.0) -> float:
    """max|a - b| / max|a|, where a difference below ``least`` is none; infinities and NaNs must stand at the same places.

    Extreme values, such as a mask's ``finfo.min``, are compared apart: beside them every other error would be nothing. They
    are of one size, a thousand times that of all others; what explodes in a deep network is of every size, and is not.
    """
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0 or (a.dtype is b.dtype and torch.equal(a, b)):
        return 0.0
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else float("inf")
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.detach().to(wide), b.detach().to(wide)
    finite = torch.isfinite(a)
    if not bool(finite.all()):
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        if not a.is_complex() and not torch.equal(_infinities(a), _infinities(b)):
            return float("inf")
        a, b = torch.where(finite, a, 0), torch.where(finite, b, 0)
    size, gap = a.abs(), (a - b).abs()
    if not bool(torch.isfinite(gap).all()):
        return float("inf")
    return _measured(size, torch.where(gap < least, 0, gap) if least else gap)


def _measured(size: torch.Tensor, gap: torch.Tensor) -> float:
    """The largest gap relative to the largest size; beside extreme values, also that of the others relative to theirs."""
    scale = float(size.max())
    plain = float(gap.max()) / (scale or 1.0)
    if scale < EXTREME:
        return plain
    top = size >= scale / 2
    others = torch.where(top, 0, size)
    if bool(top.all()) or float(others.max()) > scale / 1000:
        return plain
    return max(float(torch.where(top, gap, 0).max()) / scale, _measured(others, torch.where(top, 0, gap)))


def _infinities(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isinf(), value.sign(), 2 * value.isnan())


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; on the meta device, the same shape."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    if a.is_meta or (a.layout is torch.strided and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    if a.layout is not torch.strided or a.is_quantized:
        return torch.equal(a, b)
    return torch.equal(_bits(a), _bits(b))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer type of each size: integers compare bit by bit, where -0.0 would be 0.0 and a NaN nothing."""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.view(_BITS[plain.element_size()])
