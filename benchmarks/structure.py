"""The streams and branches that the analysis finds in every model of the zoo, against what the model's own modules say.

    python benchmarks/structure.py timm --output structure-timm.jsonl
    python benchmarks/structure.py transformers --output structure-transformers.jsonl
    python benchmarks/structure.py report structure-*.jsonl      # the table of docs/benchmarks.md

Each model writes one line to --output as soon as it is done; models that are there already are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
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
    parser.add_argument("what", choices=["timm", "transformers"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    for case in zoo.timm_cases() if options.what == "timm" else zoo.transformers_cases():
        if case.name not in done and (not options.names or case.name in options.names):
            with options.output.open("a") as file:
                file.write(json.dumps(looked_at(case)) + "\n")


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
