"""A character GPT grown twice as wide and as deep, against one that is large from its start.

    python benchmarks/expansion.py [--seeds 3] [--steps 300] [-o docs/pictures/expansion-chars.png]

A GPT of 2 blocks and width 64 is trained, grown by copies (`method=lemon`) to 4 blocks and width 128, and trained on;
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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import char_gpt

import rewrite

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
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread, {time.strftime('%Y-%m-%d')}\n")
    run_chars(options.seeds, options.steps, options.output)


if __name__ == "__main__":
    main()
