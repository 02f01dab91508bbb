"""The streams and branches that the analysis finds in every model of the zoo, against what the model's own modules say.

    python benchmarks/structure.py timm --output structure-timm.jsonl
    python benchmarks/structure.py transformers --output structure-transformers.jsonl
    python benchmarks/structure.py report structure-transformers.jsonl     # the table of docs/benchmarks.md

Each model writes one line to --output as soon as it is done; models that are there already are skipped.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rewrite
from rewrite.analysis.branches import branches
from rewrite.analysis.residuals import residual_adds
from rewrite.analysis.streams import streams
from tests.models import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["timm", "transformers", "report"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.what == "report":
        report([json.loads(line) for name in options.names for line in Path(name).read_text().splitlines()])
        return
    options.output = options.output or Path(f"structure-{options.what}.jsonl")
    warnings.simplefilter("ignore")
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    for case in zoo.timm_cases() if options.what == "timm" else zoo.transformers_cases():
        if case.name not in done and (not options.names or case.name in options.names):
            with options.output.open("a") as file:
                file.write(json.dumps(looked_at(case)) + "\n")


ATTENTION = re.compile(r"(Attention|Attn|MultiQuery)")
OTHER = re.compile(r"(Output|Embedding|Pool|Norm|Mask|Layer$|Block$|Softmax|Rotary|Bias|Drop)")
FFN = re.compile(r"(MLP|Mlp|FeedForward|FFN|Ffn|MoE|Intermediate$|DenseReluDense|DenseActDense|DenseGatedActDense)")


def told(modules: list[list[str]]) -> tuple[int, int]:
    """How many attentions and how many FFNs (or mixtures of them) a model has, by the class names of its modules."""
    attention = [path for path, kind in modules if ATTENTION.search(kind) and not OTHER.search(kind)]
    ffn = {path for path, kind in modules if FFN.search(kind)}
    ffn |= {path.rpartition(".")[0] for path, _ in modules if path.endswith((".fc1", ".lin1"))} - ffn
    return len(outermost(attention)), len(outermost(ffn))


def outermost(paths: Collection[str]) -> list[str]:
    """Those that lie below no other one."""
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def report(found: list[dict[str, Any]]) -> None:
    """How many models have as many branches as their modules say, and the others one by one."""
    seen = [each for each in found if "error" not in each]
    slowest = max(each["seconds"] for each in seen)
    rows = []
    for each in seen:
        kinds = collections.Counter("attention" if "attention" in b[2] else "ffn" for b in each["branches"])
        if (kinds["attention"], kinds["ffn"]) != (say := told(each["modules"])):
            counts = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(b[2] for b in each["branches"]).items())
            rows.append(f"| {each['name']} | {counts or 'none'} | {say[0]} attention, {say[1]} FFN | {each['additions']} |")
    agreeing = len(seen) - len(rows)
    print(f"{len(seen)} models, {agreeing} as their modules say; slowest analysis {slowest:.2f} s")
    print("not captured:", ", ".join(each["name"] for each in found if "error" in each) or "none")
    print("\n| model | branches found | by the names of its modules | residual additions |\n| --- | --- | --- | --- |")
    print("\n".join(rows))


def looked_at(case: zoo.Case) -> dict[str, Any]:
    """The structure of one model, its modules by path and class, and how long the analysis took."""
    model = case.build()
    modules = [(path, type(module).__name__) for path, module in model.named_modules()]
    try:
        program = rewrite.capture(model, *case.inputs(2, 12))
    except Exception as error:
        return {"name": case.name, "error": f"{type(error).__name__}: {error}"[:300], "modules": modules}
    began = time.perf_counter()
    found = streams(program)
    every = branches(program, found)
    seconds = time.perf_counter() - began
    return {
        "name": case.name,
        "nodes": len(program.graph.nodes),
        "seconds": seconds,
        "streams": [[s.size, len(s.residual), s.torn.name if s.torn else None] for s in found],
        "additions": len(residual_adds(program)),
        "branches": [[b.layer, b.path, b.kind, b.order, b.parallel, b.scale is not None, len(b.leaks)] for b in every],
        "modules": modules,
    }


if __name__ == "__main__":
    main()
