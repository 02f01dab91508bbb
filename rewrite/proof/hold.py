"""Holding cuts: the new form against the old one, at recorded values first, then at probes that recorded values hide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Node

from rewrite.errors import first_line
from rewrite.numerics.compare import TOLERANCE

from .cuts import Cut
from .form import Form, Outcome
from .judge import Gap, excess, gap, resized_draws, tolerance
from .record import Tape
from .setting import Setting, one_ulp, projection
from .tensors import World
from .variants import EXAMPLE, FRESH

Values = Sequence[torch.Tensor]

NEIGHBORS = 8
"""At how many values near each other a gradient in few digits has to be off until it counts."""


@dataclass(frozen=True)
class Trial:
    """Border values to try both forms on, in a setting; None where the program has none. At ``recorded`` values the old form
    has to run.
    """

    name: str
    values: Values | None
    setting: Setting
    recorded: bool = False


@dataclass(frozen=True)
class Forms:
    """Both forms of one cut, ready to run."""

    cut: Cut
    old: Form
    new: Form

    @classmethod
    def of(cls, worlds: tuple[World, World], cut: Cut) -> Forms:
        """Both forms, each in its world: that before the pass and that after it."""
        return cls(cut, *Form.both(worlds, cut))

    def gap(self, values: Values, setting: Setting) -> Gap:
        """The gap at some border values in one setting. Where the old form does not run, the new one need not."""
        old, new = _tried(self.old, values, setting), _tried(self.new, values, setting)
        if isinstance(old, Exception):
            return Gap(unrun=first_line(old))
        if isinstance(new, Exception):
            return Gap(problem=f"{type(new).__name__}: {first_line(new)}")
        if self.cut.written and any(b and not a for a, b in zip(old.aliased, new.aliased, strict=False)):
            return Gap(problem="an output is an input itself, and something writes into it later")
        if not setting.silent and resized_draws(old, new):
            return replace(self.gap(values, replace(setting, silent=True)), silent=True)
        if new.draws and not old.draws and self._ignores_draws(old, new, values, setting):
            new = replace(new, draws=0)
        return gap(old, new, gradients=setting.gradients)

    def _ignores_draws(self, old: Outcome, new: Outcome, values: Values, setting: Setting) -> bool:
        """Whether what the new form draws changes nothing that the old one has, bit for bit: it is multiplied by zero."""
        again = _tried(self.new, values, replace(setting, draw=setting.draw + 1))
        if isinstance(again, Exception):
            return False
        pairs = [*zip(new.outputs, again.outputs, strict=True), *((g, again.gradients.get(n)) for n, g in _shared(old, new))]
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    def tried(self, trial: Trial, values: Values) -> Gap:
        """The gap that counts in one trial; a part that cannot run alone is refused, never skipped."""
        found = self.judged(values, trial.setting)
        if found.unrun and trial.recorded:
            return Gap(problem=f"this part of the model cannot be run alone: {found.unrun}")
        return found

    def judged(self, values: Values, setting: Setting) -> Gap:
        """The gap that counts: what rounding explains, as measured by one ulp at the border, is none."""
        if not setting.exact:
            return self._rounded(values, setting)
        found = self.gap(values, setting)
        return found if found.largest <= TOLERANCE else self._excused(found, values, setting)

    def _rounded(self, values: Values, setting: Setting) -> Gap:
        """In a dtype of few digits: the new form's error against exact arithmetic may be a few times the old one's.

        Where a ReLU's input is within rounding of its kink, a single gradient jumps, in whichever form rounds it to the
        other side. What is wrong is wrong nearby too: a gradient counts that is off at all of some neighboring values.
        """
        found = self._excess(values, setting)
        for draw in range(1, NEIGHBORS):
            if found.problem or found.outputs or not found.gradients:
                break
            nearby = self._excess([_nearby(v, draw) for v in values], replace(setting, moved=setting.moved + 0.02 * draw))
            if not nearby.largest:
                return nearby
        return found

    def _excess(self, values: Values, setting: Setting) -> Gap:
        """How much larger the new form's rounding error is than the old one's allows, at some values."""
        truth = _tried(self.old, values, replace(setting, exact=True, autocast=False))
        old, new = _tried(self.old, values, setting), _tried(self.new, values, replace(setting, apart=True))
        if isinstance(truth, Exception):
            return Gap(unrun=first_line(truth))
        if isinstance(old, Exception):
            return Gap(unrun=first_line(old))
        if isinstance(new, Exception):
            return Gap(problem=f"{type(new).__name__}: {first_line(new)}")
        unlike = gap(old, new, gradients=False)
        if unlike.problem and not setting.autocast:
            return unlike
        own = self.new.run(values, replace(setting, exact=True, autocast=False, apart=True)) if new.sources else truth
        return excess(truth, old, new, own, _eps(setting, values))

    def _excused(self, found: Gap, values: Values, setting: Setting) -> Gap:
        """Nothing, where it is no more than what an ulp at the border, or in the weights, does to the old form.

        Where the gradients alone are off, what an ulp does to the new one counts too: a gradient that is 0 but for rounding,
        as that of a bias before a norm, is rounded by each form in its own way.
        """
        if found.problem or not setting.exact:
            return found
        moved = [one_ulp(v.double() if v.is_floating_point() else v) for v in values]
        nudged = replace(setting, nudged=True)
        forms = [self.old, *[self.new] * (max(found.outputs, found.state) <= TOLERANCE)]
        for form in forms:
            plain = _tried(form, values, setting)
            for inputs, how in ((moved, setting), (values, nudged)):
                other = _tried(form, inputs, how)
                if isinstance(plain, Exception) or isinstance(other, Exception):
                    continue
                noise = gap(replace(plain, inputs=[]), replace(other, inputs=[]), gradients=setting.gradients)
                if found.largest <= tolerance((noise,)):
                    return replace(found, outputs=0.0, gradients=0.0, state=0.0)
        return found


def _shared(old: Outcome, new: Outcome) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The new form's gradients of what the old one has too."""
    yield from ((name, gradient) for name, gradient in new.gradients.items() if name in old.gradients)


def _nearby(value: torch.Tensor, draw: int) -> torch.Tensor:
    """Each number of a tensor moved by normal noise of 2 % of itself."""
    return value * (1 + 0.02 * projection(value, 7919 + draw)) if value.is_floating_point() else value


def _tried(form: Form, values: Values, setting: Setting) -> Outcome | Exception:
    try:
        return form.run(values, setting)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return error


def trials(
    forms: Forms, border: Sequence[Node], tape: Tape, plain: Setting, modes: Sequence[bool], *, first: bool
) -> Iterator[Trial]:
    """What a part is tried on: recorded values in each mode and, for the first of its class, more of them and probes."""
    for name in tape.inputs if first else (EXAMPLE,):
        for training in modes if name in (EXAMPLE, FRESH) else modes[:1]:
            if training and not (forms.old.is_modal or forms.new.is_modal):
                continue  # it ran in evaluation just now, and nothing in it asked for the mode
            values = tape.values(border, name, training=training)
            setting = replace(plain, training=training)
            yield Trial(f"{name} in training" if training else name, values, setting, recorded=True)
    example = tape.values(border, EXAMPLE, training=False)
    if first and example is not None:
        yield from probes(example, plain)
        words = _every_word(forms, example)
        if words is not None:
            yield Trial("every index of the embedding", words, plain)


def probes(values: Values, plain: Setting) -> Iterator[Trial]:
    """What recorded values hide: large and spread ones, other weights, later calls, no gradient, few digits."""
    generator = torch.Generator().manual_seed(1)
    yield Trial("hot values", [8 * v if v.is_floating_point() else v for v in values], plain)
    yield Trial("wide values", [_wide(v, generator) for v in values], plain)
    yield Trial("other weights", values, replace(plain, moved=0.3))
    yield Trial("large weights", values, replace(plain, moved=4.0))
    yield Trial("a third call", values, replace(plain, calls=3))
    yield Trial("no gradient", values, replace(plain, gradients=False))
    if any(v.is_floating_point() for v in values):
        own = replace(plain, exact=False)
        yield Trial("the own dtype", values, own)
        yield Trial("bfloat16", values, replace(own, dtype=torch.bfloat16))
        yield Trial("autocast", values, replace(own, autocast=True))


def _every_word(forms: Forms, values: Values) -> list[torch.Tensor] | None:
    """The values with all indices of an embedding in place of those that go into one; None where there is none."""
    made = list(values)
    for node, layer in forms.old.layers():
        if isinstance(layer, nn.Embedding):
            count = layer.num_embeddings
            for i in (i for i, source in enumerate(forms.old.border) if source in node.all_input_nodes):
                words = torch.arange(made[i].numel(), device=made[i].device) % count
                made[i] = words.reshape(made[i].shape).to(made[i].dtype)
    return None if all(a is b for a, b in zip(made, values, strict=True)) else made


def _wide(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not value.is_floating_point() or value.numel() == 0:
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (noise * torch.exp2(12 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 6)).to(value)


def _eps(setting: Setting, values: Values) -> float:
    dtypes = [v.dtype for v in values if v.is_floating_point()]
    dtype = torch.bfloat16 if setting.autocast else setting.dtype or (dtypes[0] if dtypes else torch.float32)
    return float(torch.finfo(dtype).eps)
