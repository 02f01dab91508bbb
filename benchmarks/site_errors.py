"""The picture of calibrated norms: the relative error of each, in order, a line for each pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import rewrite


def errors_of(program: rewrite.Program) -> dict[str, float]:
    """The error of each norm that the last pass calibrated, by its path."""
    return {m.path: float(m.figures["error"]) for m in program.history[-1].measured if "error" in m.figures}


def draw(errors: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """A line for each pipeline that has errors."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for text, found in errors.items():
        if found:
            axes.plot(list(found), list(found.values()), marker="o", label=text)
    axes.set_ylabel("relative error of the output")
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", rotation=75, labelsize=7)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
