"""What depth passes cost in quality and gain in time: a character GPT of 12 layers, trained on real text.

    python benchmarks/depth.py quality [--seeds 0,1,2] [--steps 1500] [--heal 100] [--models FOLDER] [--picture FILE.png]
    python benchmarks/depth.py latency [--rounds 15] [--backends eager,inductor,onnxruntime]
    python benchmarks/depth.py healing [--heal 200] [--models FOLDER]

`quality` drops the attentions that add least, fuses the FFNs that then stand in a row, and heals; against dropping the FFNs
that fusion takes up outright, and against deleting whole blocks one by one, each time the one whose loss is least (SLEB).
Losses are on text held back, nats a character; latency is of one call by ONNX Runtime, batch 1, the
fastest tenth of bursts that take turns. It goes on where the last run stopped: benchmarks/results/depth.jsonl keeps a line a
model, and of those it holds the latency alone is taken again. `--seeds ''` makes table and picture of what is there.
`latency` times sequential FFNs against the same side by side and as one. `healing` says how much of what a pass costs is won
back, for a pass of each family that costs anything. Trained models are kept in a folder between runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rewrite
from rewrite import Program
from rewrite.analysis.branches import branches

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import char_gpt

RESULTS = Path(__file__).parent / "results" / "depth.jsonl"
DEPTH, WIDTH, BATCH = 12, 96, 16
BURST = 4
CUTS = (2, 4, 6)
"""From how many layers the attention is dropped."""
FAMILIES = (
    "dyt{calibrate=lsq}",
    "dyt",
    "random-prune{sparsity=0.3}",
    "drop-attention{layers=auto:4}",
    "drop-blocks{layers=auto:2}",
    "parallel-block{layers='1-10'}",
)


def trained(seed: int, steps: int, folder: Path) -> char_gpt.CharGPT:
    """The model of a seed, from the folder if it is there."""
    file = folder / f"gpt12-{seed}-{steps}.pt"
    if file.exists():
        found: char_gpt.CharGPT = torch.load(file, weights_only=False)
        return found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = char_gpt.CharGPT(width=WIDTH, depth=DEPTH, heads=4)
    char_gpt.train(model, steps, seed, lr=2e-3)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model, file)
    return model


def calls(seed: int, count: int) -> list[Tensor]:
    """Stretches of the training text that the model's own training did not begin with."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [char_gpt.windows(char_gpt.corpus().train, BATCH, generator)[0] for _ in range(count)]


def loss(program: Program) -> float:
    """On text held back."""
    return char_gpt.validation_loss(program.module.eval())


def healed(program: Program, teacher: Program, steps: int, seed: int) -> Program:
    """After healing by the original's probabilities."""
    return rewrite.heal(program, teacher, calls(seed, steps + 4), steps=steps, loss="kl", seed=seed)


# ---- quality -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One model: how it was made, its losses at once and healed, and its latency in milliseconds, where it was taken."""

    seed: int
    method: str
    cut: int
    at_once: float
    healed: float
    latency: float | None = None


def quality(options: argparse.Namespace) -> None:
    known = options.results.read_text().splitlines() if options.results.exists() else []
    points = {(p.seed, p.method, p.cut): p for p in (Point(**json.loads(line)) for line in known)}
    for seed in map(int, filter(None, options.seeds.split(","))):
        model = trained(seed, options.steps, options.models)
        program = rewrite.capture(model, (calls(seed, 1)[0],))
        variants = made(program, seed)
        times = latencies([v for _, _, v in variants], (calls(seed, 1)[0][:1],), options.rounds, options.by)
        for (method, cut, variant), taken in zip(variants, times, strict=True):
            found = points.get((seed, method, cut))
            if found is None:
                cured = variant if method == "as it is" or not options.heal else healed(variant, program, options.heal, seed)
                found = Point(seed, method, cut, loss(variant), loss(cured))
            points[seed, method, cut] = replace(found, latency=taken)
            print(points[seed, method, cut], file=sys.stderr, flush=True)
            options.results.write_text("".join(json.dumps(vars(p)) + "\n" for p in points.values()))
    table([*points.values()], options.heal)
    contrasts([*points.values()], options.heal)
    if options.picture:
        picture([*points.values()], options.picture)


def made(program: Program, seed: int) -> list[tuple[str, int, Program]]:
    """Every variant of a model: by method, and how much was cut."""
    data = calls(seed, 8)
    found = [("as it is", 0, program)]
    for cut in CUTS:
        dropped = rewrite.apply(program, f"drop-attention{{layers=auto:{cut}}}", data=data, verify=False)
        fused = rewrite.apply(dropped, "ffn-fusion{bound=9}", verify=False)
        gone = _absorbed(dropped, fused)
        found += [("attention dropped", cut, dropped), ("FFNs fused", cut, fused)]
        if gone:
            outright = rewrite.apply(dropped, f"drop-ffn{{layers='{gone}' bound=9}}", verify=False)
            found.append(("the same FFNs dropped", cut, outright))
    return [*found, *(("blocks deleted (SLEB)", i, p) for i, p in enumerate(sleb(program, max(CUTS) - 1, seed), 1))]


def _absorbed(before: Program, after: Program) -> str:
    """The layers whose FFN is part of another's after fusion."""
    left = {b.path for b in branches(after) if b.kind == "ffn"}
    return ",".join(str(b.layer) for b in branches(before) if b.kind == "ffn" and b.path not in left)


def sleb(program: Program, count: int, seed: int) -> list[Program]:
    """Blocks deleted one after the other, each time the one without which the loss on training text is least."""
    generator = torch.Generator().manual_seed(2000 + seed)
    pairs = [char_gpt.windows(char_gpt.corpus().train, 64, generator) for _ in range(2)]
    found = []
    for _ in range(count):
        last = max(b.layer for b in branches(program))
        tried = [rewrite.apply(program, f"drop-blocks{{layers={i} bound=9}}", verify=False) for i in range(last + 1)]
        with torch.no_grad():
            losses = [sum(float(char_gpt.loss_of(p.module.eval(), *pair)) for pair in pairs) for p in tried]
        program = tried[losses.index(min(losses))]
        found.append(program)
    return found


def table(points: Sequence[Point], steps: int) -> None:
    """One row a method and cut, over seeds."""
    print(f"| model | cut | seeds | ms, batch 1 | loss at once | after {steps} steps of healing |\n" + "| --- " * 6 + "|")
    for method, cut in dict.fromkeys((p.method, p.cut) for p in points):
        rows = [p for p in points if (p.method, p.cut) == (method, cut)]
        columns = [[p.latency for p in rows if p.latency], [p.at_once for p in rows], [p.healed for p in rows]]
        print(f"| {method} | {cut or ''} | {len(rows)} | " + " | ".join(spread(c) for c in columns) + " |")


def contrasts(points: Sequence[Point], steps: int) -> None:
    """What fusion loses against each other way, healed, seed by seed: below 0 it loses less."""
    print(f"\n| attentions dropped | FFNs fused, after {steps} steps, less | seeds | difference |\n" + "| --- " * 4 + "|")
    healed = {(p.seed, p.method, p.cut): p.healed for p in points}
    for cut in CUTS:
        others = (("attention dropped", cut), ("the same FFNs dropped", cut), ("blocks deleted (SLEB)", cut // 2))
        fused = [p for p in points if (p.method, p.cut) == ("FFNs fused", cut)]
        for other in others:
            pairs = [(p.healed, healed.get((p.seed, *other))) for p in fused]
            found = [one - rest for one, rest in pairs if rest is not None]
            print(f"| {cut} | {other[0]}, {other[1]} | {len(found)} | {spread(found)} |")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def picture(points: Sequence[Point], file: Path) -> None:
    """Loss against latency over seeds, hollow at once, filled after healing; bars are standard deviations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for color, method in enumerate(dict.fromkeys(p.method for p in points)):
        cuts = sorted({p.cut for p in points if p.method == method})
        rows = [[p for p in points if (p.method, p.cut) == (method, cut)] for cut in cuts]
        times = [statistics.mean(p.latency for p in row if p.latency) for row in rows]
        for name, form, fill in (("at_once", "o--", "white"), ("healed", "o-", f"C{color}")):
            losses = [[getattr(p, name) for p in row] for row in rows]
            bars = [statistics.stdev(values) if len(values) > 1 else 0 for values in losses]
            label = f"{method}, {name.replace('_', ' ')}"
            means = [statistics.mean(values) for values in losses]
            axes.errorbar(times, means, bars, fmt=form, color=f"C{color}", mfc=fill, capsize=2, label=label)
    axes.set(xlabel="latency at batch 1, ms (ONNX Runtime)", ylabel="loss on text held back, nats a character")
    axes.legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


# ---- latency -------------------------------------------------------------------------------------------------


class FFN(nn.Module):
    """x + W_2 silu(W_g n) ∘ W_1 n."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.act = nn.RMSNorm(width), nn.SiLU()
        self.gate, self.up, self.down = (
            nn.Linear(a, b, bias=False) for a, b in ((width, hidden), (width, hidden), (hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.down(self.act(self.gate(n)) * self.up(n))


def latency(options: argparse.Namespace) -> None:
    """Sequential FFNs against the same side by side and as one, in runs of 4."""
    print("| backend | batch | sequential, ms | parallel | fused | sequential over fused |\n" + "| --- " * 6 + "|")
    torch.manual_seed(0)
    model = nn.Sequential(*(FFN(256, 768) for _ in range(8)))
    sequential = rewrite.capture(model, (torch.randn(2, 1, 256),))
    text = "ffn-fusion{where='0-7' window=4 bound=9}"
    fused = rewrite.apply(sequential, text, verify=False)
    parallel = rewrite.capture(Parallel(model), (torch.randn(2, 1, 256),))
    for backend in options.backends.split(","):
        for batch in (1, 32):
            times = latencies([sequential, parallel, fused], (torch.randn(batch, 1, 256),), options.rounds, backend)
            told = " | ".join(f"{t:.3f}" for t in times)
            print(f"| {backend} | {batch} | {told} | {times[0] / times[2]:.2f} |", flush=True)


class Parallel(nn.Module):
    """The FFNs of a stack in runs, each reading what the first of its run reads."""

    def __init__(self, stack: nn.Sequential, run: int = 4) -> None:
        super().__init__()
        self.stack, self.run = stack, run

    def forward(self, x: Tensor) -> Tensor:
        for start in range(0, len(self.stack), self.run):
            x = x + sum((ffn(x) - x for ffn in self.stack[start : start + self.run]), torch.zeros_like(x))
        return x


def latencies(programs: Sequence[Program], inputs: Any, rounds: int, backend: str = "eager") -> list[float]:
    """Milliseconds of one call of each, the fastest tenth: bursts that take turns, the first call of each left aside."""
    lowered = [rewrite.lower(program, backend) for program in programs]
    times: list[list[float]] = [[] for _ in lowered]
    with torch.no_grad():
        for _ in range(rounds):
            for call, taken in zip(lowered, times, strict=True):
                call(*inputs)
                for _ in range(BURST):
                    _wait()
                    began = time.perf_counter()
                    call(*inputs)
                    _wait()
                    taken.append(1e3 * (time.perf_counter() - began))
    return [statistics.quantiles(taken[BURST:], n=10)[0] for taken in times]  # others may be at work at the same time


def _wait() -> None:
    """Until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- healing -------------------------------------------------------------------------------------------------


def healing(options: argparse.Namespace) -> None:
    """What healing wins back of what passes of several families cost."""
    model = trained(0, options.steps, options.models)
    program = rewrite.capture(model, (calls(0, 1)[0],))
    own = loss(program)
    print(f"loss {own:.3f} as it is\n\n| pass | at once | least squares alone | {options.heal} steps | won back |")
    print("| --- | --- | --- | --- | --- |")
    for text in options.passes.split(";"):
        changed = rewrite.apply(program, text, data=calls(0, 8), verify=False)
        lost = loss(changed)
        left = [loss(healed(changed, program, steps, 0)) for steps in (0, options.heal)]
        share = (lost - left[1]) / (lost - own)
        print(f"| `{text}` | {lost:.3f} | {left[0]:.3f} | {left[1]:.3f} | {100 * share:.0f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds: dict[str, Callable[[argparse.Namespace], None]] = {"quality": quality, "latency": latency, "healing": healing}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--seeds", default="0", help="of models and batches, after each other")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--heal", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", default="eager,inductor,onnxruntime")
    parser.add_argument("--models", type=Path, default=Path("depth-models"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--by", default="onnxruntime", help="the backend whose latency `quality` takes")
    parser.add_argument("--passes", default=";".join(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {time.strftime('%Y-%m-%d')}\n"
    )
    kinds[options.kind](options)


if __name__ == "__main__":
    main()
