"""Draw what each pass does to a tiny model, before and after, into docs/pictures/passes.json, for docs/make_passes.py.

python docs/make_pictures.py [NAME ...]     draw those passes, by default all that have no picture yet
"""

from __future__ import annotations

import difflib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.fx import Node

import rewrite
from rewrite.graph.nodes import packet
from tests.passes import table

FILE = Path(__file__).with_name("pictures") / "passes.json"
LINES, WIDTH = 14, 112


def main() -> int:
    """Draw; the exit code."""
    warnings.simplefilter("ignore")
    drawn: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    rows = {row.name: row for row in table.cheapest() if row.changes}
    names = sys.argv[1:] or [name for name in rows if name not in drawn]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            row = rows[name]
            before = table.subject(row.model, Path(folder), row.after).program
            after = rewrite.apply(before, row.step, data=row.data(), verify=False)
            drawn[name] = {"step": row.step, "after": row.after, "model": row.model, "lines": [*picture(before, after)]}
            print(f"{name}: {row.step} on {row.model}")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(dict(sorted(drawn.items())), indent=1, ensure_ascii=False) + "\n")
    return 0


def picture(before: rewrite.Program, after: rewrite.Program) -> Iterator[str]:
    """The graph's first changes as a diff, the tensors that change, the properties."""
    changes = difflib.unified_diff([*lines(before)], [*lines(after)], n=1, lineterm="")
    seen = [line for line in changes if not line.startswith(("---", "+++", "@@"))]
    yield from seen[:LINES]
    if len(seen) > LINES:
        yield f"  ... and {len(seen) - LINES} lines more"
    sets = [site for site in after.history[-1].changes if site.kind == "set parameter"]
    yield from (f"! {site.path} {site.detail}" for site in sets[:4])
    if len(sets) > 4:
        yield f"  ... and {len(sets) - 4} tensors more"
    yield from (f"+ property {name}" for name in after.properties if name not in before.properties)


def lines(program: rewrite.Program) -> Iterator[str]:
    """The graph, a line a node that computes."""
    for node in program.graph.nodes:
        given = ", ".join(str(value) for value in node.args)
        if node.op == "call_module":
            yield cut(f"{node.target} = {' '.join(str(program.layer(node)).split())} ({given})")
        elif node.op == "call_function":
            yield cut(f"{node.name} = {named(node)}({given})")


def named(node: Node) -> str:
    found = packet(node)
    return str(getattr(found or node.target, "__name__", node.target))


def cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."


if __name__ == "__main__":
    sys.exit(main())
