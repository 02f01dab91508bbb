"""Passes one after the other: random chains of three, from all families, on the models of the tests, each proven.

    python benchmarks/chains.py [--seconds 600] [--seed 0] [--length 3]

A pass has to be applied, to be refused by a reason, or to leave the model alone: a broken contract or any other exception
is a fault, and is printed with what came before. What a chain has made is saved and read back, and has to be the same. The
texts and models are those of the rows of tests/passes; data goes to a pass where the row of that text has the model.
"""

from __future__ import annotations

import argparse
import collections
import logging
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rewrite
from rewrite.errors import RewriteError, named_line
from rewrite.pipeline.crash import VerificationError
from tests.passes.table import rows, subject

ROWS = {row.step: row for _, row in rows() if row.changes and not row.after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    draw, end, counts = random.Random(options.seed), time.monotonic() + options.seconds, collections.Counter[str]()
    models = sorted({row.model for row in ROWS.values()})
    while time.monotonic() < end:
        counts.update(tried(draw.choice(models), draw.sample(sorted(ROWS), options.length)))
        counts["chains"] += 1
    words = ", ".join(
        f"{counts[name]} {name}" for name in ("chains", "applied", "unchanged", "refused", "read back", "faults")
    )
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, seed {options.seed}: {words}")


def tried(model: str, texts: list[str]) -> list[str]:
    """What became of each pass of a chain, and of the file at its end."""
    program, done, outcomes = subject(model).program, list[str](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        for text in texts:
            data = ROWS[text].data() if ROWS[text].model == model else None
            try:
                program = rewrite.apply(program, text, data=data, crash_folder=folder)
            except Exception as error:
                is_fault = isinstance(error, VerificationError) or not isinstance(error, RewriteError)
                outcomes.append("faults" if is_fault else "refused")
                if is_fault:
                    print(f"{model}: {' then '.join([*done, text])}: {named_line(error)}", flush=True)
                continue
            outcomes.append("applied" if program.history[-1].changed else "unchanged")
            done += [text] * program.history[-1].changed
        if done:
            outcomes.append(_read_back(program, Path(folder) / "made.pt2", f"{model}: {' then '.join(done)}"))
    return outcomes


def _read_back(program: rewrite.Program, file: Path, words: str) -> str:
    try:
        found = rewrite.verify(program, rewrite.load(rewrite.save(program, file)))
    except RewriteError:
        return "refused"
    except Exception as error:
        print(f"{words}: {named_line(error)}", flush=True)
        return "faults"
    if not found.bitwise:
        print(f"{words}: read back it is {found}", flush=True)
    return "read back" if found.bitwise else "faults"


if __name__ == "__main__":
    main()
