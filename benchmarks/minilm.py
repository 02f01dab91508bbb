"""The trained all-MiniLM-L6-v2, which is post-norm: what `rmsnorm` says of it, and what calibrated norms do to it.

    python benchmarks/minilm.py [--picture docs/pictures/minilm-sites.png]

Sentence embeddings are the mean of the last hidden state over the words, as the model was trained for. The table holds how
far the cosine similarities of all pairs of sentences move, and whether each sentence's nearest stays so.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import inspect
import itertools
import json
import pathlib
import random
import statistics
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import rewrite

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.site_errors import draw, errors_of
from tests.models.zoo import Trained, minilm

PIPELINES = (
    "dyt",
    "dyt{calibrate=formula}",
    "dyt{calibrate=lsq}",
    "derf{calibrate=lsq}",
    "eln{calibrate=lsq}",
    "dyt{calibrate=lsq fallback=9}",
)
SUBJECTS = ("the dog", "a small cat", "my neighbor", "the engineer", "a young painter", "the old captain")
DOINGS = (
    "sleeps on the sofa all day",
    "wrote a long letter to the bank",
    "repairs bicycles in the garage",
    "is learning to play the violin",
    "crossed the sea in a storm",
    "waits for the last train home",
    "cooks dinner for the whole family",
    "forgot the keys in the office",
)


def sentences() -> list[str]:
    """48 sentences."""
    return [f"{who} {what}." for who, what in itertools.product(SUBJECTS, DOINGS)]


def similarities(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """The cosine similarity of every pair."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return pooled @ pooled.T


def main() -> None:
    """Print the table; draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trained = minilm()
    tokens = encoded(trained, sentences())
    texts = calibration()
    data = [encoded(trained, texts[i : i + 16]) for i in range(0, len(texts), 16)]
    program = rewrite.capture(trained.model, (), tokens)
    record = rewrite.apply(program, "rmsnorm").history[-1]
    print(f"rmsnorm: {len(record.changes)} edits; {record.skipped[-1].path}: {record.skipped[-1].reason}\n")
    before = similarities(trained.model, tokens)
    pairs = ~torch.eye(len(before), dtype=torch.bool)
    print("| pipeline | largest error of a norm | mean change of a similarity | largest | nearest kept |")
    print("| --- | --- | --- | --- | --- |")
    errors: dict[str, dict[str, float]] = {}
    for text in PIPELINES:
        made = rewrite.apply(program, text, data=data if "calibrate" in text else None)
        after = similarities(rewrite.graft(made, trained.model).eval(), tokens)
        change = (after - before).abs()[pairs]
        nearest = [(s - 2 * torch.eye(len(s))).argmax(1) for s in (before, after)]
        kept = (nearest[0] == nearest[1]).double().mean()
        errors[text] = errors_of(made)
        worst = f"{max(errors[text].values()):.3f}" if errors[text] else ""
        print(f"| `{text}` | {worst} | {change.mean():.3f} | {change.max():.3f} | {kept:.0%} |", flush=True)
    if options.picture:
        draw(errors, options.picture)


def encoded(trained: Trained, texts: list[str]) -> dict[str, Tensor]:
    return dict(trained.tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"))


def calibration() -> list[str]:
    """Other text than that which is compared: 96 doc strings of Python's standard library, 40 words of each."""
    modules = [json, argparse, itertools, textwrap, statistics, pathlib, random, collections, decimal, datetime]
    found = (inspect.getdoc(thing) for module in modules for _, thing in sorted(vars(module).items()) if callable(thing))
    long = dict.fromkeys(" ".join(text.split()[:40]) for text in found if text and len(text.split()) > 12)
    return [*long][:96]


if __name__ == "__main__":
    main()
