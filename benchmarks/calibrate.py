"""A trained character GPT whose norms become element-wise functions: its loss at once, and after some steps more.

    python benchmarks/calibrate.py [--steps 600] [--more 150] [--seeds 3]
    python benchmarks/calibrate.py --seeds 1 --more 0 --picture docs/pictures/chars-sites.png

One row a pipeline; the first is the model as it is. Losses are on text held back, in nats a character; the error is the
largest of any place, as the report of the pass has it. Calibration sees 16 batches of the training text. The picture has
the error of each norm, of the last seed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

import rewrite

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import char_gpt

from benchmarks.site_errors import draw, errors_of

METHODS = (
    "",
    "dyt{calibrate=lsq fallback=9}",
    "derf{calibrate=lsq fallback=9}",
    "eln{calibrate=lsq fallback=9}",
    "dyt{calibrate=formula fallback=9}",
    "derf{calibrate=formula fallback=9}",
    "eln{calibrate=formula fallback=9}",
    "dyt{calibrate=lsq}",
    "dyt",
)


def batches(seed: int, count: int = 16) -> list[torch.Tensor]:
    """What calibration sees."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [char_gpt.windows(char_gpt.corpus().train, 16, generator)[0] for _ in range(count)]


def scores(model: char_gpt.CharGPT, method: str, more: int, seed: int) -> tuple[dict[str, float], float, float]:
    """The error of each norm, the loss at once, and the loss after more steps."""
    made, errors = copy.deepcopy(model), {}
    if method:
        data = batches(seed)
        program = rewrite.apply(model, method, args=(data[0],), data=data)
        errors = errors_of(program)
        made = rewrite.graft(program, model)
    at_once = char_gpt.validation_loss(made)
    char_gpt.train(made, more, seed + 1, lr=1e-3)
    return errors, at_once, char_gpt.validation_loss(made)


def main() -> None:
    """Train, convert, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--more", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float, float]]] = {method: [] for method in METHODS}
    sites: dict[str, dict[str, float]] = {}
    for seed in range(options.seeds):
        model = char_gpt.make_model(seed)
        char_gpt.train(model, options.steps, seed)
        for method in METHODS:
            sites[method], *losses = scores(model, method, options.more, seed)
            found[method].append((max(sites[method].values(), default=0.0), *losses))
            print(f"seed {seed}, {method or 'as it is'}: {found[method][-1]}", file=sys.stderr, flush=True)
    print(f"| pipeline | largest error | at once | after {options.more} steps |\n| --- | --- | --- | --- |")
    for method, rows in found.items():
        print(f"| {method or 'as it is'} | {' | '.join(_spread(column) for column in zip(*rows, strict=True))} |")
    if options.picture:
        draw(sites, options.picture)


def _spread(values: tuple[float, ...]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
