"""Checks of what a pass does: it changes what it says and nothing else, every time, and can prove it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewrite.errors import RewriteError
from rewrite.graph.edit import Editor
from rewrite.graph.history import Skipped
from rewrite.graph.program import Program
from rewrite.pipeline.context import NOT_SELECTED, Context, S
from rewrite.pipeline.crash import VerificationError
from rewrite.pipeline.run import digest
from rewrite.pipeline.select import Selector
from rewrite.torch_private import pytree

from .observe import bytes_of, first_difference, graph_lines, outline, same, untouched
from .trial import Trial, changed_paths, differs_from, fail


def check_deterministic(trial: Trial) -> str:
    """Two runs give the same program and the same account, whatever the global random state is."""
    first, second = (_run_after(seed, trial.run, trial.program) for seed in (1, 2))
    gap = first_difference(first, second)
    if gap:
        raise fail("deterministic", f"two runs differ: {gap}; draw random numbers from context.seed or an option")
    if _account(first) != _account(second):
        raise fail("deterministic", "two runs give another account of what was changed or skipped")
    return "two runs give the same program"


def _run_after(seed: int, run: Callable[[Program], Program], program: Program) -> Program:
    with _random_state():
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return run(program)


@contextmanager
def _random_state() -> Iterator[None]:
    """Give the caller's random state back afterwards."""
    numbers, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)


def _account(program: Program) -> Any:
    record = program.history[-1]
    return record.changes, record.skipped, record.warnings


def check_untouched(trial: Trial) -> str:
    """The model, the program before, its example inputs and the data are what they were, also with ``share=True``."""
    before, data = trial.program, trial.data
    modules = [m for m in (before.module, trial.subject.model) if m is not None]
    tensors, outlines = [bytes_of(m) for m in modules], [outline(m) for m in modules]
    examples = [t.clone() for t in _examples(before)]
    lines, given = graph_lines(before), digest(data)
    for share in (False, True):
        try:
            trial.run(before, check="untouched", share=share)
        except RewriteError as error:
            raise fail("untouched", str(error)) from error
    kept = {
        "a tensor of the model": all(map(untouched, modules, tensors)),
        "a module of the model": outlines == [outline(m) for m in modules],
        "the graph of the program": lines == graph_lines(before),
        "an example input": all(map(same, examples, _examples(before))),
        "the data": digest(data) == given,
    }
    for what, held in kept.items():
        if not held:
            raise fail(
                "untouched", f"the pass changed {what} that it was given; it may change only its copy, by context.edit"
            )
    return ", ".join(kept)


def _examples(program: Program) -> list[Tensor]:
    values = (program.example_args, dict(program.example_kwargs))
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def check_changes(trial: Trial) -> str:
    """The pass changes what its author says: these paths, or so many; and where nothing, then nothing at all."""
    wrong = differs_from(trial.changes, trial.paths)
    if wrong:
        raise fail("changes", wrong)
    _same_if_unchanged("changes", trial.program, trial.result)
    return f"{len(trial.paths)} places" if trial.paths else "nothing, and says so"


def _same_if_unchanged(check: str, before: Program, after: Program) -> None:
    gap = first_difference(before, after)
    if gap and not changed_paths(after):
        raise fail(check, f"the program differs ({gap}) and the pass names no change")
    if not gap and changed_paths(after):
        raise fail(check, f"the pass says that it changed {changed_paths(after)[0]} and nothing differs")


def check_near_miss(trial: Trial) -> str:
    """Each near miss is left alone with a reason that says the expected words; every place left alone has a reason."""
    skipped = {skip.path: skip.reason for skip in trial.record.skipped}
    for path, words in trial.near_miss.items():
        if path in trial.paths:
            raise fail("near miss", f"{path} is changed and should be left alone: {words}")
        if path not in skipped:
            raise fail("near miss", f"{path} is left alone without a reason; note it by context.skip")
        if words not in skipped[path]:
            raise fail("near miss", f"{path} is left alone because {skipped[path]!r}, which does not say {words!r}")
    _all_have_reasons(trial.record.skipped, trial.step.absence)
    return f"{len(skipped)} places left alone, each with its reason"


def _all_have_reasons(skipped: Sequence[Skipped], absence: str) -> None:
    for skip in skipped:
        if not skip.reason.strip() or not (skip.path or skip.reason == absence):
            raise fail("near miss", f"{skip.path or 'a place without a path'} is left alone without a reason")


def check_elsewhere(trial: Trial) -> str:
    """A model without a place for the pass stays as it is, without an error."""
    bare = trial.subject.bare
    if bare is None:
        return "not checked: these inputs fit no other model"
    try:
        after = trial.run(bare, check="elsewhere")
    except RewriteError as error:
        raise fail("elsewhere", f"a model without a place for the pass is no error: {error}") from error
    if changed_paths(after) or first_difference(bare, after):
        raise fail("elsewhere", "a model without parameters and layers was changed")
    return "a model without a place for it stays as it is"


class _Offered(Context):
    """A context that notes the places that a selector was offered."""

    offered: list[str]

    def choose(self, sites: Any, where: Selector) -> list[S]:
        sites = list(sites)
        self.offered = [*getattr(self, "offered", ()), *(site.path for site in sites)]
        return super().choose(sites, where)


def check_partial(trial: Trial) -> str:
    """A ``where`` that selects one place leaves every other as it is, with a reason (or it is refused, by name).

    A place that only goes together with others may be left alone too, for a reason of the pass's own.
    """
    options = [f.name for f in dataclasses.fields(trial.step) if isinstance(getattr(trial.step, f.name), Selector)]  # type: ignore[arg-type]
    if "where" not in options or not trial.paths:
        return "not checked: there is no option where" if trial.paths else "not checked: nothing changes"
    places = _places(trial)
    if not places:
        raise fail("partial", "the option where is never asked: choose places by context.choose(sites, self.where)")
    chosen = next((p for p in places if any(_within(c, p) for c in trial.paths)), places[0])
    step = dataclasses.replace(trial.step, where=Selector(_exactly(chosen)))  # type: ignore[type-var]
    try:
        after = trial.run(trial.program, step, check="partial")
    except RewriteError as error:
        return f"refused: {error}"
    return _only(chosen, [p for p in places if p != chosen], after)


def _places(trial: Trial) -> list[str]:
    program = trial.program.clone()
    context = _Offered(Editor(program, trial.step.text), trial.seed, trial.data)
    trial.step.run(program, context)
    return list(dict.fromkeys(getattr(context, "offered", ())))


def _exactly(path: str) -> str:
    """A selector's text for one path; a glob, so that it is found written as users write it."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in path)


def _only(chosen: str, others: Sequence[str], after: Program) -> str:
    for path in changed_paths(after):
        if any(_within(path, other) for other in others) and not _within(path, chosen):
            raise fail("partial", f"where={chosen} changed {path}, which it does not select")
    reasons = {skip.path: skip.reason for skip in after.history[-1].skipped}
    missing = {*others} - {*reasons}
    if missing:
        raise fail("partial", f"where={chosen} leaves {min(missing)} alone without a reason")
    if not changed_paths(after):
        own = reasons.get(chosen, NOT_SELECTED)
        if not own.startswith(NOT_SELECTED):
            return f"where={chosen} alone changes nothing: {own}"
        raise fail("partial", f"where={chosen} selects a place that the pass changes, and nothing changed")
    return f"where={chosen} leaves {len(others)} others"


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def check_twice(trial: Trial) -> str:
    """A second run changes what its author says, nothing by default; a refusal by name changes nothing."""
    try:
        second = trial.run(trial.result, check="twice", verify=True)
    except VerificationError as error:
        raise fail("twice", f"the second run breaks the contract: {error}") from error
    except RewriteError as error:
        _as_expected(trial, [])
        return f"the second run is refused: {error}"
    _as_expected(trial, changed_paths(second))
    _same_if_unchanged("twice", trial.result, second)
    return f"the second run changes {len(changed_paths(second)) or 'nothing'}"


def _as_expected(trial: Trial, paths: Sequence[str]) -> None:
    wrong = differs_from(trial.again, paths)
    if wrong:
        raise fail("twice", f"in the second run {wrong}")


def check_proof(trial: Trial) -> str:
    """The engine's proof of the contract holds, and there is something that it checked."""
    try:
        proven = trial.run(trial.program, check="proof", verify=True)
    except VerificationError as error:
        raise fail("proof", str(error)) from error
    verification = proven.history[-1].verification
    if verification is None or not verification.passed:
        raise fail("proof", "there is no proof")
    return f"{trial.step.contract()}: {', '.join(check.name for check in verification.checks)}"
