"""Passes one after the other: random chains of three, from all families, on the models of the tests, each proven.

    python benchmarks/chains.py [--seconds 600] [--seed 0] [--length 3]

A pass has to be applied, to be refused by a reason, or to leave the model alone: a broken contract or any other exception
is a fault, and is printed with what came before. What a chain has made is saved and read back, and has to be the same; it is
grafted into the model's class, and converted to ONNX, which are to hold what they made against it or to refuse by a reason.
The texts and models are those of the rows of tests/passes; data goes to a pass where the row of that text has the model.
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
from collections.abc import Callable
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
    names = ("chains", "applied", "unchanged", "refused", *(f"{no}{end}" for end in ENDS for no in ("", "not ")), "faults")
    words = ", ".join(f"{counts[name]} {name}" for name in names)
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
            outcomes += [_ended(program, model, end, Path(folder), " then ".join(done)) for end in ENDS]
    return outcomes


def _ended(program: rewrite.Program, model: str, end: str, folder: Path, words: str) -> str:
    """What became of a chain's result at one of its ends."""
    try:
        ENDS[end](program, model, folder)
    except Exception as error:
        if isinstance(error, RewriteError) and not isinstance(error, VerificationError):
            return f"not {end}"
        print(f"{model}: {words}: {end}: {named_line(error)}", flush=True)
        return "faults"
    return end


def _read_back(program: rewrite.Program, _: str, folder: Path) -> None:
    found = rewrite.verify(program, rewrite.load(rewrite.save(program, folder / "made.pt2")))
    assert found.bitwise, f"read back it is {found}"


def _grafted(program: rewrite.Program, model: str, _: Path) -> None:
    whole = subject(model).model
    assert whole is not None
    rewrite.graft(program, whole)


def _converted(program: rewrite.Program, _: str, folder: Path) -> None:
    rewrite.export_onnx(program, folder / "made.onnx")


ENDS: dict[str, Callable[[rewrite.Program, str, Path], None]] = {
    "read back": _read_back,
    "grafted": _grafted,
    "converted": _converted,
}


if __name__ == "__main__":
    main()
