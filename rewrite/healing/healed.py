"""`rewrite.heal`: a rewritten program trained from the original until it gives nearly what that gives."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from rewrite.analysis.observe import home, inputs_of, whole_calls
from rewrite.errors import RewriteError, named_line
from rewrite.frontend.capture import capture
from rewrite.graph.history import Record
from rewrite.graph.program import Program, tensors_of
from rewrite.graph.tree import on_meta
from rewrite.numerics.guard import fingerprint
from rewrite.numerics.probes import light_copy
from rewrite.sources.data import Data

from .checkpoint import Checkpoint, Standing
from .forward import Watching
from .least_squares import Inputs, fit
from .losses import LossName, OutputLoss
from .pairs import pairs
from .record import NOTHING, record_of
from .training import Options, Training

HELD = 4
"""How many calls are held back at most; a tenth of them otherwise, one at least."""
FITTED = 8
"""How many calls least squares looks at."""


def heal(
    new: Program,
    teacher: Program | nn.Module,
    data: Any,
    *,
    steps: int = 200,
    lr: float = 5e-4,
    loss: LossName = "auto",
    hidden: float = 1.0,
    batch: int = 32,
    patience: int = 10,
    closed_form: bool = True,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    listener: Callable[[str], None] = lambda step: None,
) -> Program:
    """Train ``new`` to give what ``teacher``, the model before its passes, gives on ``data``: a new Program.

    First the closed form: behind each edit the linear layer whose output is added there is fitted by least squares, so that
    the sum is the original's; kept where that is better on data held back. Then ``steps`` of AdamW on all parameters that
    require a gradient, by L = L_out + ``hidden`` · mean over edits of Σ (h - h')² / Σ (h' - mean h')², h and h' the values
    behind an edit where they have one shape. L_out is by ``loss``: ``kl`` is KL(p' | p) of the softmax over the last axis,
    in nats a position, ``mse`` is Σ (y - y')² / Σ (y' - mean y')², ``auto`` is kl where an output is called ``logits`` and
    mse otherwise. The learning rate rises for a twentieth of the steps and falls by half a cosine. Both models run in
    evaluation, without dropout.

    ``data`` is what ``rewrite.apply(data=)`` takes, cut into calls of ``batch`` samples; no more calls are read than there
    are steps and some to judge by. A tenth of them, at most 4, is held back: its loss is looked at 20 times (after
    5 steps at least), training ends after ``patience`` looks without a better one, and the result has the best one's values.
    ``checkpoint`` is a file that is written at each look, and gone on from if it is there. Equal seeds give equal results.

    Raises RewriteError for data that is empty or does not fit, outputs of other shapes, options out of range, a program
    without values or without trained parameters, and a checkpoint of another healing. Neither program is changed.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); the values inside, Romero et
    al., "FitNets", ICLR 2015 (arXiv 1412.6550).
    """
    options = Options(steps, lr, loss, hidden, batch, patience, closed_form, seed)
    _check(new, options)
    began = time.perf_counter()
    old = teacher if isinstance(teacher, Program) else capture(teacher, new.example_args, dict(new.example_kwargs))
    if on_meta(old.module):
        raise RewriteError("the teacher is on the meta device: it has no values to learn from")
    found = Data.of(data)
    mark = _mark(new, old, found, options)
    student = new.clone()
    training = _prepared(light_copy(old), student, found, options, listener)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        record = _healed(training, Checkpoint(None if checkpoint is None else Path(checkpoint), mark), new)
    for was, now in zip(new.module.modules(), student.module.modules(), strict=True):
        now.training = was.training
    for parameter in student.module.parameters():
        parameter.grad = None
    record = replace(record, seconds=time.perf_counter() - began, data=found.sha256)
    return replace(student, history=(*new.history, record))


def _check(new: Program, options: Options) -> None:
    if not isinstance(new, Program):
        raise RewriteError(f"heal takes a Program, not a {type(new).__name__}: rewrite.capture(model, args) makes one")
    if on_meta(new.module):
        raise RewriteError("the program is on the meta device: it has no values to heal")
    if not any(p.requires_grad for p in new.module.parameters()):
        raise RewriteError("the program has no parameters that require a gradient: there is nothing to train")
    if options.loss not in get_args(LossName):
        raise RewriteError(f"loss is one of {', '.join(get_args(LossName))}, not {options.loss!r}")
    least = {"steps": 0, "hidden": 0, "batch": 1, "patience": 1}
    wrong = next((name for name, bound in least.items() if not getattr(options, name) >= bound), None)
    if wrong or not 0 < options.lr < math.inf or not options.hidden < math.inf:
        raise RewriteError(f"{wrong or 'lr'}={getattr(options, wrong or 'lr')} is out of range")


def _mark(new: Program, old: Program, data: Data, options: Options) -> str:
    """What tells this healing from every other."""
    digests = [fingerprint(tensors_of(p.module)) for p in (new, old)]
    text = f"{new.module.code}{old.module.code}{data.sha256}{options}"
    return hashlib.sha256(b"".join(digests) + text.encode()).hexdigest()


def _prepared(old: Program, student: Program, data: Data, options: Options, listener: Callable[[str], None]) -> Training:
    listener("healing: reading the data")
    old.module.eval()
    student.module.eval()
    calls = list(itertools.islice(whole_calls(student, data, options.batch), max(options.steps, FITTED) + HELD))
    if not calls:
        raise RewriteError("the data is empty")
    device = home(student.module)
    inputs = [(_bound(old, call, i, device), _bound(student, call, i, device)) for i, call in enumerate(calls)]
    held = _spread(len(inputs))
    seen = [each for i, each in enumerate(inputs) if i not in held] or inputs
    found = pairs(old, student)
    outputs = _outputs(old, inputs[0][0])
    return Training(
        old, student, found, OutputLoss(options.loss, old, outputs), seen, [inputs[i] for i in held], options, listener
    )


def _bound(program: Program, call: Any, number: int, device: torch.device) -> list[Any]:
    try:
        return inputs_of(program, call, device)
    except (RewriteError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise RewriteError(f"item {number} of the data does not fit the model: {named_line(error)}") from error


@torch.no_grad()
def _outputs(program: Program, inputs: Sequence[Any]) -> list[Any]:
    try:
        return Watching(program, ()).values(inputs)[0]
    except (RewriteError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise RewriteError(f"the model does not run on the data: {named_line(error)}") from error


def _spread(count: int) -> list[int]:
    """The numbers of the calls that are held back, evenly among all."""
    held = min(HELD, max(1, count // 10))
    return [(2 * i + 1) * count // (2 * held) for i in range(held)]


def _healed(training: Training, checkpoint: Checkpoint, new: Program) -> Record:
    before = training.gaps()
    standing = checkpoint.read()
    if standing is None:
        standing = _fitted(training)
    if standing.first > NOTHING:
        standing = training.run(standing, checkpoint)
    return record_of(training, standing, new, before, training.gaps())


def _fitted(training: Training) -> Standing:
    """Where training begins: after least squares, where that is better for the model as a whole."""
    plain = training.begun()
    if not training.options.closed_form or plain.first <= NOTHING:
        return plain
    seen: Inputs = training.seen[:FITTED]
    fits = fit(training.teacher, training.student, training.pairs, seen, training.held, training.tell)
    fitted = training.begun()
    if not fitted.first < plain.first:
        training.put(plain.best)
        return plain
    return replace(fitted, first=plain.first, fits=[(each.path, each.before, each.after) for each in fits])
