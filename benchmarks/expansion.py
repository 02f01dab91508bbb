"""Growing models: every expansion on the models of the zoo, and a character GPT grown twice as wide and as deep.

    python benchmarks/expansion.py zoo [--library transformers|timm] [--seconds 600] [NAME ...]
    python benchmarks/expansion.py chars [--seeds 3] [--steps 300] [-o docs/pictures/expansion-chars.png]

zoo: each pass is run with its proof; a cell holds the largest relative error of outputs and gradients in exact arithmetic,
`-` where the model has no such dimension, `refused`, with the reasons below, or what failed.

chars: a GPT of 2 blocks and width 64 is trained, grown by copies (`method=lemon`) to 4 blocks and width 128, and trained on;
beside it the large one from its start for the same compute, and the small one for as many steps. Losses are of text held
back, compute is counted in steps of the large model, whose step costs that of the small one times the ratio of parameters
in blocks.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import char_gpt

import rewrite
from rewrite.errors import RewriteError, first_line
from rewrite.pipeline.crash import VerificationError
from tests.models import zoo

STEPS = {
    "ffn": "expand{ffn=2x}",
    "heads": "expand{heads=2x}",
    "head_dim": "expand{head_dim=+4}",
    "value_dim": "expand{value_dim=+4}",
    "hidden": "expand{hidden=+8}",
    "layers": "expand{layers=+1}",
    "lemon": "expand{method=lemon hidden=+8}",
    "clone": "expand{method=clone hidden=2x untie=true}",
}


# -------------------- the zoo --------------------


@dataclass
class Tally:
    """What became of one expansion, over models."""

    applied: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    none: int = 0


def run_zoo(library: str, seconds: int, names: list[str]) -> None:
    """Print a row a model, then what became of each expansion."""
    cases = zoo.transformers_cases() if library == "transformers" else zoo.timm_cases()
    cases = [case for case in cases if not names or case.name in names]
    tallies = {kind: Tally() for kind in STEPS}
    print(f"| model | {' | '.join(STEPS)} |\n| --- |{' --- |' * len(STEPS)}")
    began, done = time.monotonic(), 0
    for case in cases:
        if time.monotonic() - began > seconds:
            break
        done += 1
        print(f"| {case.name} | {' | '.join(row(case, tallies))} |", flush=True)
    print(f"\n{done} of {len(cases)} models\n\n| expansion | applied | worst error | refused | no such dimension | failed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for kind, tally in tallies.items():
        worst = f"{max(tally.applied):.0e}" if tally.applied else ""
        counts = f"{sum(tally.refused.values())} | {tally.none} | {len(tally.failed)}"
        print(f"| {kind} | {len(tally.applied)} | {worst} | {counts} |")
    for kind, tally in tallies.items():
        for reason, count in tally.refused.most_common():
            print(f"- {kind}: {reason} ({count})")
        for failure in tally.failed:
            print(f"- {kind} FAILED: {failure}")


def row(case: zoo.Case, tallies: dict[str, Tally]) -> list[str]:
    """The cells of one model."""
    args, kwargs = case.inputs(2, 7)
    try:
        program = rewrite.capture(case.build(), args, kwargs)
    except Exception as error:  # a model that cannot be captured is another benchmark's
        return [f"not captured: {first_line(error)[:60]}", *[""] * (len(STEPS) - 1)]
    return [cell(case.name, program, text, tallies[kind]) for kind, text in STEPS.items()]


def cell(name: str, program: rewrite.Program, text: str, tally: Tally) -> str:
    """What one expansion does on one model."""
    try:
        record = rewrite.apply(program, text, crash_folder="/tmp/expansion").history[-1]
    except VerificationError as error:
        tally.failed.append(f"{name}: {first_line(error)[:160]}")
        return "FAILED"
    except RewriteError as error:
        tally.refused[without_names(first_line(error))] += 1
        return "refused"
    except Exception as error:  # a fault of ours: it counts
        tally.failed.append(f"{name}: {type(error).__name__}: {first_line(error)[:160]}")
        return "FAILED"
    if not record.changes:
        tally.none += 1
        return "-"
    assert record.verification is not None
    details = [check.detail for check in record.verification.checks if "same" in check.name.split(": ")]
    errors = [float(detail.split("parts, ")[1].split(";")[0]) for detail in details]
    tally.applied.append(max(errors))
    return f"{max(errors):.0e}"


def without_names(reason: str) -> str:
    """A reason without what is the model's own: its last part, places left out."""
    words = reason.partition("): ")[2] or reason.partition(": ")[2]
    kept = ("head_dim", "value_dim", "method=lemon", "untie=true")
    words = " ".join(
        word if word.startswith(kept) or not ("." in word.strip(".,:;") or "_" in word) else "..." for word in words.split()
    )
    return words[:120]


# -------------------- a character GPT --------------------

WIDTH, DEPTH, HEADS = 64, 2, 2
GROW = "expand{method=lemon hidden=2x ffn=2x heads=2x layers=2x at=copy}"


@dataclass
class Curve:
    """Losses on text held back, at compute in steps of the large model."""

    compute: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def note(self, compute: float, model: nn.Module) -> None:
        """The loss of a model now."""
        self.compute.append(compute)
        self.losses.append(char_gpt.validation_loss(model, batches=4))


def run_chars(seeds: int, steps: int, picture: Path | None) -> None:
    """Print the losses of each seed, and draw the curves."""
    cost = 1 / 8
    print(f"small: {DEPTH} blocks, width {WIDTH}, {steps * 2} steps; grown by {GROW}, {steps} more\n")
    print("| seed | small, before | grown, at once | grown, after | large, equal compute | small, equal steps |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    curves = [one(seed, steps, cost) for seed in range(seeds)]
    for seed, (small, grown, scratch, more) in enumerate(curves):
        cells = (small.losses[-1], grown.losses[0], grown.losses[-1], scratch.losses[-1], more.losses[-1])
        print(f"| {seed} | {' | '.join(f'{value:.4f}' for value in cells)} |")
    saved = [1 - reached(grown, scratch.losses[-1]) / scratch.compute[-1] for _, grown, scratch, _ in curves]
    print(f"\ncompute saved until the large model's last loss: {', '.join(f'{100 * s:.0f} %' for s in saved)}; ", end="")
    print(f"mean {100 * statistics.mean(saved):.0f} %")
    if picture is not None:
        draw(curves, picture)


def one(seed: int, steps: int, cost: float) -> tuple[Curve, Curve, Curve, Curve]:
    """The curves of one seed: the small model, the grown one, the large one from its start, the small one trained on."""
    torch.manual_seed(seed)
    small = char_gpt.CharGPT(width=WIDTH, depth=DEPTH, heads=HEADS)
    before = trained(small, 2 * steps, seed, Curve(), 0.0, cost)
    ids = char_gpt.windows(char_gpt.corpus().train, 4, torch.Generator().manual_seed(0))[0]
    grown = rewrite.apply(small, GROW, (ids,), seed=seed).module
    start = 2 * steps * cost
    after = trained(grown, steps, seed + 100, Curve(), start, 1.0)
    large = char_gpt.CharGPT(width=2 * WIDTH, depth=2 * DEPTH, heads=2 * HEADS)
    scratch = trained(large, round(steps + start), seed, Curve(), 0.0, 1.0)
    more = trained(small, steps, seed + 100, Curve(), start, cost)
    return before, after, scratch, more


def trained(model: nn.Module, steps: int, seed: int, curve: Curve, start: float, cost: float) -> Curve:
    """Train a model in place and note its losses on the way."""
    curve.note(start, model)
    every = max(1, steps // 12)

    def tell(step: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            curve.note(start + step * cost, model)

    char_gpt.train(model, steps, seed, tell=tell)
    return curve


def reached(curve: Curve, loss: float) -> float:
    """The compute at which a curve first falls to a loss, between the points that it has; its end where it does not."""
    points = list(zip(curve.compute, curve.losses, strict=True))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= loss:
            return x1 if y0 <= loss else x0 + (x1 - x0) * (y0 - loss) / (y0 - y1)
    return curve.compute[-1]


def draw(curves: list[tuple[Curve, Curve, Curve, Curve]], path: Path) -> None:
    """The curves of all seeds over compute."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    words = ("small", "grown 2x wide, 2x deep", "large from its start")
    for seed, found in enumerate(curves):
        for curve, color, label in zip(found, ("tab:gray", "tab:blue", "tab:orange"), words, strict=False):
            axes.plot(curve.compute, curve.losses, color=color, alpha=0.8, label=label if seed == 0 else None)
    axes.set_xlabel("compute, steps of the large model")
    axes.set_ylabel("loss on text held back, nats a character")
    axes.set_ylim(top=3.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    models = parts.add_parser("zoo")
    models.add_argument("names", nargs="*")
    models.add_argument("--library", choices=("transformers", "timm"), default="transformers")
    models.add_argument("--seconds", type=int, default=600, help="stop after so many")
    chars = parts.add_parser("chars")
    chars.add_argument("--seeds", type=int, default=3)
    chars.add_argument("--steps", type=int, default=300)
    chars.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.strftime('%Y-%m-%d')}\n")
    if options.part == "zoo":
        run_zoo(options.library, options.seconds, options.names)
    else:
        run_chars(options.seeds, options.steps, options.output)


if __name__ == "__main__":
    main()
