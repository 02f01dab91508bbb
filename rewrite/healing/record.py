"""What a healing did, as the history keeps it: the parameters it changed, what was measured, what was checked."""

from __future__ import annotations

from rewrite.graph.history import Check, Measured, Record, Site, Skipped, Verification
from rewrite.graph.program import Program
from rewrite.numerics.compare import same_bytes

from .checkpoint import Standing
from .training import Training

NOTHING = 1e-10
"""A distance that is rounding."""


def record_of(
    training: Training,
    standing: Standing,
    new: Program,
    before: tuple[float, list[float]],
    after: tuple[float, list[float]],
) -> Record:
    """The entry of a healing in a program's history; ``before`` and ``after`` are what ``Training.gaps`` measured."""
    student, options = training.student, training.options
    olds = dict(new.module.named_parameters())
    changed = [name for name, p in student.module.named_parameters() if not same_bytes(p, olds[name])]
    fits = {f"least squares at {path}": (start, end) for path, start, end in standing.fits}
    gaps = zip(training.pairs, before[1], after[1], strict=True)
    values = {f"behind {pair.path}": (start, end) for pair, start, end in gaps}
    measured = {f"outputs ({training.loss.name})": (before[0], after[0]), **values, **fits}
    count = sum(p.numel() for p in student.module.parameters())
    return Record(
        "heal",
        f"heal{{steps={options.steps} loss={training.loss.name} lr={options.lr:g}}}",
        {**vars(options), "loss": training.loss.name, "steps taken": standing.step},
        0.0,
        tuple(Site(name, "set parameter", "healed") for name in changed),
        () if changed else (Skipped("", _reason(standing)),),
        (),
        "forward new, backward new",
        (count, count),
        Verification(_checks(training, standing, new), 0.0, options.seed),
        measured=tuple(Measured(path, {"before": start, "after": end}) for path, (start, end) in measured.items()),
    )


def _reason(standing: Standing) -> str:
    if standing.first <= NOTHING:
        return "it gives what the original gives already"
    return "no step made it better on the data held back; a smaller lr, or more data, may"


def _checks(training: Training, standing: Standing, new: Program) -> tuple[Check, ...]:
    """That parameters alone changed, and that the result is no worse."""
    student = training.student
    state = zip(student.module.named_parameters(), new.module.named_parameters(), strict=True)
    frozen = [same_bytes(a, b) for (_, a), (_, b) in state if not a.requires_grad]
    buffers = [same_bytes(a, b) for a, b in zip(student.module.buffers(), new.module.buffers(), strict=True)]
    finite = all(bool(p.isfinite().all()) for p in student.module.parameters())
    told = f"loss {standing.first:.4g} -> {standing.least:.4g} in {standing.step} steps"
    return (
        Check("graph", student.module.code == new.module.code, "as it was"),
        Check("kept", all((*frozen, *buffers)), f"{len(frozen)} frozen parameters and {len(buffers)} buffers bit for bit"),
        Check("finite", finite, "all parameters"),
        Check("held back", standing.least <= standing.first, told, standing.least),
    )
