"""Running passes over a program, one after the other, with a record and a proof of each."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rewrite.errors import RewriteError
from rewrite.frontend.capture import capture
from rewrite.graph.change import Change
from rewrite.graph.copies import uncollected
from rewrite.graph.edit import Editor
from rewrite.graph.history import Record, Site, Skipped, Verification
from rewrite.graph.maps import Step
from rewrite.graph.program import Program, tensors_of
from rewrite.graph.renumber import named_anew
from rewrite.numerics.compare import same_bytes
from rewrite.numerics.guard import ReadOnly, WrittenInPlaceError, fingerprint
from rewrite.numerics.probes import light_copy
from rewrite.proof.frame import differs
from rewrite.proof.prove import Claim, proof_of
from rewrite.sources.data import Data
from rewrite.torch_private import pytree

from .context import Context
from .crash import VerificationError
from .pass_ import Pass
from .registry import as_passes
from .settings import Listener, Settings

PassSpec = str | Pass | Sequence[str | Pass]


def apply(
    model: Program | nn.Module,
    passes: PassSpec,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    verify: bool = True,
    share: bool = False,
    data: Any = None,
    crash_folder: str | os.PathLike[str] | None = None,
    listener: Listener = lambda step: None,
) -> Program:
    """Run passes over a program (or a module, which is captured first); the result is a new Program.

    ``passes`` is pipeline text, a pass, or a list of both. Each pass is verified against its contract unless ``verify``
    is False. With ``share`` the result shares the tensors that no pass changed, otherwise it has its own. ``data`` is what
    passes that look at samples are given: an iterable, a file or a folder, see ``rewrite.sources.data.Data.of``.

    Raises RewriteError for bad text, options or selectors, and VerificationError (a RewriteError) when a pass breaks
    its word; the input is left as it was and a crash bundle is written below ``crash_folder`` (default: the current
    folder).
    """
    chain = as_passes(passes)
    if isinstance(model, Program):
        program = model
    else:
        listener(f"capturing {type(model).__name__}")
        program = capture(model, tuple(args or ()), kwargs)
    folder = Path.cwd() if crash_folder is None else Path(crash_folder)
    settings = Settings(seed, verify, share, None if data is None else Data.of(data), folder, listener)
    for step in chain:
        program = run_pass(program, step, settings)
    return program if chain else program.clone(share=share)


def run_pass(program: Program, step: Pass, settings: Settings) -> Program:
    """One pass over a copy of ``program``, recorded and, if asked, verified; a pass made of passes step by step."""
    if type(step).steps is not Pass.steps:
        return _run_steps(program, step, settings)
    settings.listener(f"running {step.text}")
    began = time.perf_counter()
    given = _fingerprints(program)
    result, context, own = _run(program, step, settings)
    seconds = time.perf_counter() - began
    with uncollected():
        changed = differs(program, result)
    if not changed:
        context.edit.changes.clear()
    verification: Verification | None = None
    if settings.verify:
        settings.listener(f"verifying {step.text}")
        rerun = functools.partial(rewritten, step=step, settings=settings, writes=own is None)
        verification = proof_of(Claim(program, result, context.edit.changes, step, settings.seed, rerun))
    for what, now in _fingerprints(program).items():
        if now != given[what]:
            raise RewriteError(f"pass {step.text} wrote into {what} of the program that it was given, which is spoiled now")
    record = Record(
        step.name,
        step.text,
        step.options(),
        seconds,
        _sites(context.edit.changes),
        tuple(context.skipped) or _absence(step, changed=changed),
        tuple(context.warnings),
        str(step.contract()),
        (_count(program), _count(result)),
        verification,
        digest(settings.data),
        measured=tuple(context.measured),
    )
    done = _step(context.edit.changes)
    lineage = (*program.lineage, done)
    result = replace(named_anew(result, done.names), history=(*program.history, record), lineage=lineage)
    if verification is not None and not verification.passed:
        raise VerificationError.of(program, result, step, verification, settings)
    for parameter, data in own or ():
        parameter.data = data
    return result


def _run_steps(program: Program, step: Pass, settings: Settings) -> Program:
    """A pass made of passes: each run and proven by itself; one record of the whole, with theirs in it."""
    settings.listener(f"planning {step.text}")
    plan = program.clone(share=True)
    context = Context(Editor(plan, step.text), settings.seed, settings.data, settings.listener)
    parts = tuple(step.steps(plan, context))
    for part in parts:
        if not step.contract().covers(part.contract()):
            raise RewriteError(
                f"pass {step.text} promises {step.contract()}, and its step {part.text} only {part.contract()}"
            )
    result = program if parts else program.clone(share=settings.share)
    for part in parts:
        result = run_pass(result, part, settings)
    records = result.history[len(program.history) :]
    record = Record(
        step.name,
        step.text,
        step.options(),
        sum(r.seconds for r in records),
        tuple(site for r in records for site in r.changes),
        (*context.skipped, *(skip for r in records for skip in r.skipped)) or _absence(step, changed=bool(parts)),
        (*context.warnings, *(warning for r in records for warning in r.warnings)),
        str(step.contract()),
        (_count(program), _count(result)),
        _together(records, settings) if settings.verify else None,
        digest(settings.data),
        records,
        (*context.measured, *(measured for r in records for measured in r.measured)),
    )
    return replace(result, history=(*program.history, record))


def _absence(step: Pass, *, changed: bool) -> tuple[Skipped, ...]:
    """What the model lacks, where a pass found no place in it and says so."""
    return (Skipped("", step.absence),) if step.absence and not changed else ()


def _together(records: Sequence[Record], settings: Settings) -> Verification:
    """The proofs of several passes as one: each check under the name of its pass."""
    proofs = [(r.name, r.verification) for r in records if r.verification is not None]
    checks = (replace(check, name=f"{name}: {check.name}") for name, proof in proofs for check in proof.checks)
    return Verification(tuple(checks), sum(proof.seconds for _, proof in proofs), settings.seed)


def edited(program: Program, step: Pass, settings: Settings) -> Context:
    """Run a pass on ``program`` itself; the context that the pass left."""
    with uncollected() if settings.data is None else contextlib.nullcontext():  # data may leave much garbage behind
        context = Context(Editor(program, step.text), settings.seed, settings.data, settings.listener)
        step.run(program, context)
        context.edit.follow()
        if context.edit.reshapes:
            context.edit.revalue()
        program.graph.lint()
        program.module.recompile()
    return context


_Own = list[tuple[nn.Parameter, torch.Tensor]]


def _run(program: Program, step: Pass, settings: Settings) -> tuple[Program, Context, _Own | None]:
    """A pass run on a copy of ``program``, and the memory that its parameters are to have in the end; None where the pass
    wrote into parameters.

    The copy has its own memory while the pass runs, for that may write there by any means. Parameters that stayed as they
    were look into the program's memory until they are proven: nothing is compared with itself.
    """
    if settings.share:
        result = program.clone(share=True)
        with ReadOnly(tensors_of(program.module)):
            return result, edited(result, step, settings), []
    copies: dict[int, Any] = {}
    with uncollected():
        result = replace(program, module=copy.deepcopy(program.module, copies))
    context = edited(result, step, settings)
    pairs = [(p, copies[id(p)]) for p in program.module.parameters() if type(p) is nn.Parameter]
    if not all(same_bytes(old, new) for old, new in pairs):
        return result, context, None
    own = [(new, new.data) for _, new in pairs]
    for old, new in pairs:
        new.data = old.detach()
    return result, context, own


def rewritten(program: Program, *, step: Pass, settings: Settings, writes: bool = False) -> tuple[Program, Sequence[Change]]:
    """A copy of ``program`` after a pass, and the edits; it shares the parameters' memory unless the pass ``writes``."""
    if not writes:
        with contextlib.suppress(WrittenInPlaceError), ReadOnly(program.module.parameters()):
            result = light_copy(program)
            return result, edited(result, step, settings).edit.changes
    result = program.clone()
    return result, edited(result, step, settings).edit.changes


def _fingerprints(program: Program) -> dict[str, bytes]:
    """A digest of the tensors of a program, and one of its example inputs."""
    examples = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    inputs = (value for value in examples if isinstance(value, torch.Tensor))
    return {"a tensor": fingerprint(tensors_of(program.module)), "an example input": fingerprint(inputs)}


def digest(data: Any) -> str | None:
    """The SHA-256 of data; None without any."""
    return None if data is None else Data.of(data).sha256


def _sites(changes: Sequence[Change]) -> tuple[Site, ...]:
    return tuple(Site(c.path or c.node, c.kind, c.detail) for c in changes)


def _step(changes: Sequence[Change]) -> Step:
    """How parameters follow from those before a pass, by its edits; a path that was set twice by the last of them."""
    found = {change.path: change.map for change in changes if change.kind in ("set parameter", "untie")}
    names = dict(pair for change in changes for pair in change.names)
    return Step(names, {path: None if made is None else made.bare() for path, made in found.items()})


def _count(program: Program) -> int:
    return sum(p.numel() for p in program.module.parameters())
