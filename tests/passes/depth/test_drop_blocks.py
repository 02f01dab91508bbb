"""drop-blocks: the models the kit tries it on, and what is left."""

from __future__ import annotations

from rewrite import apply
from rewrite.analysis.branches import branches
from tests.compare import captured
from tests.passes.table import Row

ROWS = [
    Row("drop-blocks{layers=1}", "vit", 15),
    Row("drop-blocks{layers=0}", "TiedHead", 0),
]


def test_all_branches_of_a_layer_go() -> None:
    for name in ("gpt2", "llama", "convnext_atto", "resnet18"):
        before = [b.path for b in branches(captured(name)) if b.layer != 1]
        assert [b.path for b in branches(apply(captured(name), "drop-blocks{layers=1}"))] == before, name
