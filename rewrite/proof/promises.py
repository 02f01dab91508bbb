"""Each promise with its check: SAME by the old form, NEW and CLOSE by the method's formula, ESTIMATE by its gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from rewrite.graph.history import Check
from rewrite.graph.maps import ParameterMap
from rewrite.graph.program import Program
from rewrite.graph.relation import Relation

from .claims import Claims, is_tensor
from .classes import signature
from .contract import CLOSE, ESTIMATE, NEW, SAME, Contract, NoFormulaError, Promising
from .cuts import Cut, Cutter
from .estimate import gradient_held
from .form import Form
from .held import Held, hold, summed
from .hold import Forms, trials
from .identity import Sameness
from .judge import Gap
from .local import LocalProof
from .record import Tape
from .reference import ReferenceForm
from .setting import Setting
from .tensors import World
from .variants import EXAMPLE, variants


@dataclass(frozen=True)
class Rewritten:
    """A program before and after a pass, how parameters follow, the pass (if one connects them), and the seed.

    ``moved`` names nodes whose values change on purpose, with what becomes of them where the pass says it. Without
    ``probed`` every part is held at recorded values of the example alone.
    """

    before: Program
    after: Program
    contract: Contract
    maps: Mapping[str, ParameterMap] = field(default_factory=dict)
    step: Promising | None = None
    seed: int = 0
    probed: bool = True
    moved: Mapping[str, Relation | None] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[bool, ...]:
        """Whether training counts: evaluation only, or both."""
        return (False,) if self.contract.evaluation_only else (False, True)


def kept_promises(parts: Parts, label: str = "") -> Iterator[Check]:
    """The checks of a contract: a promise without a check is refused."""
    contract = parts.given.contract
    if contract.forward is SAME:
        yield same(parts.given, label)
        if contract.backward is ESTIMATE:
            yield from estimate(parts, label)
        return
    yield formula(parts, label)
    if contract.forward is not NEW:
        yield close(parts, label)


def same(rewritten: Rewritten, label: str = "") -> Check:
    """Every part that differs equals its old form; the gradient too where it is promised."""
    gradients = rewritten.contract.backward is SAME
    what = "outputs, state and gradients" if gradients else "outputs and state"
    check = summed(f"same{label}", _local(rewritten, rewritten.moved).held(), what)
    if check.passed or not any(rewritten.moved.values()):
        return check
    # what a pass said of values on their way need not hold: what comes of them may be the same all the same
    return summed(f"same{label}", _local(rewritten, dict.fromkeys(rewritten.moved)).held(), what)


def _local(rewritten: Rewritten, moved: Mapping[str, Relation | None]) -> LocalProof:
    return LocalProof(
        rewritten.before,
        rewritten.after,
        rewritten.maps,
        gradients=rewritten.contract.backward is SAME,
        training=len(rewritten.modes) > 1,
        probed=rewritten.probed,
        seed=rewritten.seed,
        moved=moved,
    )


class Parts:
    """The parts in which two programs differ, not grown, each to be held against a formula."""

    def __init__(self, rewritten: Rewritten, like: Parts | None = None) -> None:
        """``like``: the parts of another program, before and after the same pass, at whose values formulas may be held."""
        self.given = rewritten
        self.like = like
        origin = World.of(rewritten.before.module)
        self.worlds = (origin, World.of(rewritten.after.module, rewritten.maps, origin))

    @functools.cached_property
    def claims(self) -> Claims:
        """Which values of the two programs are claimed to be the same."""
        return Claims.of(self.given.before, self.given.after)

    @functools.cached_property
    def cuts(self) -> list[Cut]:
        """The parts."""
        return Cutter(self.claims).cuts()

    @functools.cached_property
    def firsts(self) -> list[Cut]:
        """The first part of each class."""
        before, after = self.given.before.module, self.given.after.module
        return list({signature(cut, before, after): cut for cut in reversed(self.cuts)}.values())

    def holds_old_alone(self, cut: Cut) -> bool:
        """Whether a CLOSE part holds nothing but what stood there: some was taken out, and its error is all that counts."""
        if self.given.contract.forward is not CLOSE:
            return False
        pairs = ((self.claims.partner.get(node), node) for node in cut.new)
        return all(
            old is not None and ((old, node) not in self.claims.tests or self._stays(old, node)) for old, node in pairs
        )

    def _stays(self, old: Node, new: Node) -> bool:
        """Whether a layer was replaced by itself, but for writing in place or not."""
        if old.op != "call_module" or new.op != "call_module":
            return False
        ours, theirs = self.given.before.layer(old), self.given.after.layer(new)
        return hasattr(ours, "inplace") and Sameness().unlike(ours, theirs, ["inplace"]) is None

    @functools.cached_property
    def ends(self) -> tuple[list[Node], list[Node]]:
        """The tensors that the program before returns, and those after in their place."""
        pairs = [(old, new) for old, new in self.claims.final() if is_tensor(old) and is_tensor(new)]
        return [old for old, _ in pairs], [new for _, new in pairs]

    @functools.cached_property
    def inputs(self) -> dict[str, list[torch.Tensor]]:
        """What both programs are recorded on, by name."""
        return dict(variants(self.given.before, self.given.seed))

    @functools.cached_property
    def site_error(self) -> tuple[float, str]:
        """The largest error of a part against its old form, at the values that flow into that, and where it is."""
        worst, where = 0.0, ""
        for cut in self.cuts:
            error = _error_of(self, cut)
            if error > worst:
                worst, where = error, cut.name
        return worst, where

    @functools.cached_property
    def after_tape(self) -> Tape:
        """Values of the program after, where its parts begin and at its end."""
        tape = Tape(self.given.after, self.inputs, self.given.seed, self.like.after_tape if self.like else None)
        nodes, probed = ([n for cut in cuts for n in cut.new_border] for cuts in (self.cuts, self.firsts))
        tape.keep(nodes if self.like else [*nodes, *self.ends[1]], probed)
        return tape

    @functools.cached_property
    def before_tape(self) -> Tape:
        """Values of the program before, where its parts begin and at its end."""
        tape = Tape(self.given.before, self.inputs, self.given.seed)
        tape.keep([*(n for cut in self.cuts for n in cut.old_border), *self.ends[0]])
        return tape


def formula(parts: Parts, label: str = "") -> Check:
    """Every part equals the formula that the pass gives for it, written apart from its layers."""
    made = [cut for cut in parts.cuts if not parts.holds_old_alone(cut)]
    return summed(f"formula{label}", map(functools.partial(_by_formula, parts), made), "outputs and gradients")


def _by_formula(parts: Parts, cut: Cut) -> Held:
    step, setting = parts.given.step, Setting(seed=parts.given.seed)
    if step is None:
        return Held(cut, (), 0, 0.0, ("nothing", Gap(problem="no pass says what it should compute")))
    forms = Forms(
        cut, ReferenceForm(parts.worlds, cut, step), Form.of(parts.worlds[1], cut.new, cut.new_border, cut.outputs)
    )
    tried = trials(
        forms, cut.new_border, parts.after_tape, setting, parts.given.modes, first=parts.given.probed and cut in parts.firsts
    )
    try:
        return hold(forms, tried)
    except NoFormulaError as error:
        return Held(cut, (), 0, 0.0, ("nothing", Gap(problem=str(error))))


def close(parts: Parts, label: str = "") -> Check:
    """No part is further from its old form than the bound, at the values that flow into it."""
    bound = parts.given.contract.error_bound
    worst, where = parts.site_error
    detail = f"{worst:.3g} (relative, root mean square{f', worst at {where}' if where else ''}; bound {bound:g})"
    return Check(f"close{label}", worst <= bound, detail, worst)


def reported(parts: Parts) -> Iterator[Check]:
    """What training has to make good: the output error on the example inputs, and the worst site's."""
    old, new = (
        tape.values(nodes, EXAMPLE, training=False) or []
        for tape, nodes in zip((parts.before_tape, parts.after_tape), parts.ends, strict=True)
    )
    error = max((_rms_error(a, b) for a, b in zip(old, new, strict=True) if a.shape == b.shape), default=0.0)
    yield Check("output error", True, "relative, root mean square, at the example inputs", error)
    error, where = parts.site_error
    if where:
        yield Check("site error", True, f"relative, worst at {where}", error)


def _error_of(parts: Parts, cut: Cut) -> float:
    forms = Forms.of(parts.worlds, cut)
    values = parts.before_tape.values(cut.old_border, EXAMPLE, training=False)
    assert values is not None
    setting = Setting(gradients=False, seed=parts.given.seed)
    old, new = (form.run(values, setting).outputs for form in (forms.old, forms.new))
    return max((_rms_error(a, b) for a, b in zip(old, new, strict=True)), default=0.0)


def _rms_error(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    scale = float(a.square().mean().sqrt())
    return float((a - b).square().mean().sqrt()) / scale if scale else float(not torch.equal(a, b))


def estimate(parts: Parts, label: str = "") -> Iterator[Check]:
    """The forward bit for bit; the gradient by the method's formula, and near enough to the true one."""
    if not parts.cuts:
        return  # what a property of the whole program does is held by itself
    yield summed(f"bit for bit{label}", map(functools.partial(_bitwise, parts), parts.cuts), "outputs in the own dtype")
    yield from gradient_held(parts.cuts, parts.worlds, parts.before_tape, parts.given, label)


def _bitwise(parts: Parts, cut: Cut) -> Held:
    forms = Forms.of(parts.worlds, cut)
    tried: list[str] = []
    for training in parts.given.modes:
        values = parts.before_tape.values(cut.old_border, EXAMPLE, training=training)
        if values is None:
            continue
        setting = Setting(exact=False, gradients=False, training=training, seed=parts.given.seed)
        found = forms.gap(values, setting)
        tried.append(f"{EXAMPLE} in training" if training else EXAMPLE)
        if found.largest > 0:
            return Held(cut, tuple(tried), 0, found.largest, ("the own dtype", found))
    return Held(cut, tuple(tried), 0, 0.0)
