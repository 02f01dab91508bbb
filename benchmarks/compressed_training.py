"""Train with compressed activations and exactly, from the same start on the same batches: how far apart the losses end.

    python benchmarks/compressed_training.py [--tasks digits,chars] [--seeds 3] [--steps N] [--picture FILE.png]

A character GPT (two blocks of width 64) on the standard library's sources and the ViT of `convert_and_train.py` on
scikit-learn's digits, one thread. `other rounding` is the exact run from weights that are off by one part in a million: how
far two runs part by rounding alone. A run's training loss is the mean over its last tenth of steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import convert_and_train
import torch
from convert_and_train import TASKS, Task, char_gpt
from torch import nn

import rewrite

EXACT, OTHER = "exact", "other rounding"
WAYS = {
    EXACT: "",
    OTHER: "",
    "8 bits": "compress-activations",
    "4 bits": "compress-activations{bits=4}",
}
HEAD = "| | training loss | off | held back | off | CPU s |\n|" + " --- |" * 6
STEPS = {"digits": 200, "chars": 300}


@dataclass(frozen=True)
class Run:
    """The losses of a run: of each step, at the end on the training data, on what is held back; CPU seconds."""

    steps: Sequence[float]
    trained: float
    held_back: float
    seconds: float


def small_gpt(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return char_gpt.CharGPT(width=64, depth=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="digits,chars")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps; by default those of the task")
    parser.add_argument("--picture", type=Path, help="draw the losses into this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(convert_and_train.environment())
    found: dict[str, dict[str, list[Run]]] = {}
    for name in options.tasks.split(","):
        task = replace(TASKS[name], make=small_gpt) if name == "chars" else TASKS[name]
        steps = options.steps or STEPS[name]
        print(f"\n{name}, {steps} steps, {options.seeds} seeds\n\n{HEAD}", flush=True)
        found[name] = {}
        for way in WAYS:
            found[name][way] = [run(task, way, seed, steps) for seed in range(options.seeds)]
            print(row(way, found[name]), flush=True)
    if options.picture:
        draw(found, options.picture)


def run(task: Task, way: str, seed: int, steps: int) -> Run:
    """Train the model of a seed in one way."""
    model = task.make(seed)
    if way == OTHER:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
    module: nn.Module = model
    if WAYS[way]:
        module = rewrite.apply(copy.deepcopy(model), WAYS[way], args=(task.example(),), verify=False).module
    torch.manual_seed(seed)
    began = time.process_time()
    losses = task.train(module, steps, seed)
    seconds = time.process_time() - began
    return Run(losses, statistics.mean(losses[-max(1, steps // 10) :]), task.score(module).loss, seconds)


def row(way: str, ways: Mapping[str, Sequence[Run]]) -> str:
    """The mean losses of a way, and what they differ by from the exact run of the same seed: mean (largest)."""
    cells = [way]
    for kind in ("trained", "held_back"):
        off = [getattr(a, kind) - getattr(b, kind) for a, b in zip(ways[way], ways[EXACT], strict=True)]
        cells.append(f"{statistics.mean(getattr(each, kind) for each in ways[way]):.4f}")
        cells.append("" if way == EXACT else f"{statistics.mean(off):+.5f} ({max(off, key=abs):+.5f})")
    return f"| {' | '.join([*cells, f'{statistics.mean(each.seconds for each in ways[way]):.0f}'])} |"


def draw(found: Mapping[str, Mapping[str, Sequence[Run]]], file: Path) -> None:
    """Training losses, smoothed over 20 steps: the mean of the seeds in each way, and what it is off the exact one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(found)), layout="constrained")
    rows: Any = figure.subplots(len(found), 2, squeeze=False)
    for (name, ways), (left, right) in zip(found.items(), rows, strict=True):
        curves = {way: smoothed(torch.tensor([each.steps for each in runs]).mean(0)) for way, runs in ways.items()}
        for way, curve in curves.items():
            left.plot(curve, label=way, linewidth=1)
            if way != EXACT:
                right.plot(curve - curves[EXACT], label=way, linewidth=1, color=left.lines[-1].get_color())
        left.set(title=f"{name}: training loss", xlabel="step", yscale="log")
        right.set(title=f"{name}: off the exact run", xlabel="step")
        left.legend()
    figure.savefig(file)


def smoothed(losses: torch.Tensor) -> torch.Tensor:
    """Means over 20 steps."""
    return losses.unfold(0, min(20, len(losses)), 1).mean(-1)


if __name__ == "__main__":
    main()
