"""Train a model and the same model converted by a pass from the same start, and compare how far they get.

    python benchmarks/convert_and_train.py [--task digits|chars] [--pass 'dyt{alpha=2}'] [--seeds 5] [--steps N]

For each seed a fresh model is made, a copy of it is converted, and both are trained on the same batches. The table
holds their final validation losses and accuracies; the last line says whether the mean difference of the loss is
within noise: whether 0 lies in the 95 % interval of Student's t over the paired differences.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import scipy.stats
import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import rewrite

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import char_gpt

# -------------------- tasks --------------------


@dataclass(frozen=True)
class Score:
    """What a trained model reaches on the data held back: loss in nats, accuracy in 0..1."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """A model, its example input, how to train it in place and how to score it."""

    name: str
    make: Callable[[int], nn.Module]
    example: Callable[[], Tensor]
    train: Callable[[nn.Module, int, int], list[float]]
    score: Callable[[nn.Module], Score]
    steps: int


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitViT(nn.Module):
    """A pre-norm vision transformer: images [batch, 1, 8, 8] in patches of 2 -> logits [batch, 10].

    Positions start with deviation 1, as embeddings of torch do: the stream then has the scale for which tanh bends, and
    LayerNorm trains better too. With deviation 0.02 DyT starts as a linear map and lags behind.
    """

    def __init__(self, width: int = 48, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then those held back: a quarter, always the same."""
    bunch = sklearn.datasets.load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).float().unsqueeze(1)[order] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()[order]
    held = len(labels) // 4
    return images[held:], labels[held:], images[:held], labels[:held]


def make_digit_vit(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitViT()


def train_digits(model: nn.Module, steps: int, seed: int, lr: float = 1e-3, batch: int = 64) -> list[float]:
    """Train in place and return the loss of each step; the seed chooses the batches."""
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    losses = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = char_gpt.learning_rate(step, steps, lr)
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def score_digits(model: nn.Module) -> Score:
    _, _, images, labels = digits()
    logits = model.eval()(images)
    return Score(F.cross_entropy(logits, labels).item(), (logits.argmax(-1) == labels).float().mean().item())


def train_chars(model: nn.Module, steps: int, seed: int) -> list[float]:
    return char_gpt.train(model, steps, seed)


@torch.no_grad()
def score_chars(model: nn.Module) -> Score:
    ids, targets = char_gpt.windows(char_gpt.corpus().validation, 256, torch.Generator().manual_seed(1))
    right = (model.eval()(ids).argmax(-1) == targets).float().mean().item()
    return Score(char_gpt.validation_loss(model), right)


TASKS = {
    task.name: task
    for task in (
        Task("digits", make_digit_vit, lambda: digits()[0][:2], train_digits, score_digits, 600),
        Task(
            "chars",
            char_gpt.make_model,
            lambda: char_gpt.corpus().train[: 2 * char_gpt.CONTEXT].view(2, -1),
            train_chars,
            score_chars,
            600,
        ),
    )
}


# -------------------- the comparison --------------------


@dataclass(frozen=True)
class Pair:
    """Both scores for one seed."""

    seed: int
    original: Score
    converted: Score


def convert(model: nn.Module, passes: list[str], example: Tensor) -> nn.Module:
    """The trainable module that the passes make of a copy of the model."""
    return rewrite.apply(copy.deepcopy(model), passes, args=(example,)).module


def compare(task: Task, passes: list[str], seed: int, steps: int) -> Pair:
    """Train the original and the converted model of one seed."""
    original = task.make(seed)
    converted = convert(original, passes, task.example())
    for model in (original, converted):
        # The two may differ in how many random numbers they draw, so each starts from the same state.
        torch.manual_seed(seed)
        task.train(model, steps, seed)
    return Pair(seed, task.score(original), task.score(converted))


@dataclass(frozen=True)
class Verdict:
    """Mean difference (converted minus original) of the loss and half its 95 % interval."""

    difference: float
    half_interval: float

    @property
    def within_noise(self) -> bool:
        return abs(self.difference) <= self.half_interval


def judge(pairs: list[Pair]) -> Verdict:
    """Student's t over the paired differences.

    Raises:
        ValueError: fewer than two pairs tell nothing about noise.
    """
    if len(pairs) < 2:
        raise ValueError("two seeds or more are needed to tell a difference from noise")
    differences = [pair.converted.loss - pair.original.loss for pair in pairs]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return Verdict(statistics.mean(differences), float(scipy.stats.t.ppf(0.975, len(differences) - 1)) * error)


# -------------------- the report --------------------


def environment() -> str:
    """Versions, date and machine, in one line."""
    versions = f"rewrite {rewrite.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}"
    return f"{datetime.date.today()}; {versions}, numpy {numpy.__version__}; {platform.system()} {machine}"


def row(name: object, *values: float) -> str:
    return f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |"


def table(pairs: list[Pair]) -> str:
    """One line a seed, then mean and deviation, as Markdown."""
    numbers = [(p.original.loss, p.converted.loss, p.original.accuracy, p.converted.accuracy) for p in pairs]
    columns = list(zip(*numbers, strict=True))
    return "\n".join(
        [
            "| seed | loss, original | loss, converted | accuracy, original | accuracy, converted |",
            "| --- | --- | --- | --- | --- |",
            *(row(pair.seed, *values) for pair, values in zip(pairs, numbers, strict=True)),
            row("mean", *map(statistics.mean, columns)),
            row("deviation", *map(statistics.stdev, columns)),
        ]
    )


def conclusion(verdict: Verdict) -> str:
    word = "within noise" if verdict.within_noise else "not within noise"
    return f"converted minus original loss: {verdict.difference:+.4f} ± {verdict.half_interval:.4f} (95 %): {word}"


def main() -> None:
    """Run the comparison and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--pass", dest="passes", action="append", help="a pass and its options; may repeat")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="training steps; by default those of the task")
    options = parser.parse_args()
    task, passes = TASKS[options.task], options.passes or ["dyt"]
    steps = options.steps or task.steps
    if options.seeds < 2:
        parser.error("--seeds: two or more are needed to tell a difference from noise")
    start = time.perf_counter()
    pairs = [compare(task, passes, seed, steps) for seed in range(options.seeds)]
    seconds = time.perf_counter() - start
    print(f"{task.name}, {', '.join(passes)}, {steps} steps, {options.seeds} seeds, {seconds:.0f} s")
    print(environment(), table(pairs), conclusion(judge(pairs)), sep="\n\n")


if __name__ == "__main__":
    main()
