"""drop-ffn: the models the kit tries it on, and what is left."""

from __future__ import annotations

from rewrite import apply
from rewrite.analysis.branches import branches
from tests.captures import shared
from tests.passes.table import Row

ROWS = [
    Row("drop-ffn{layers=1}", "bert", 7, near_miss={"encoder.layer.0": "layer 0 is not among"}),
    Row("drop-ffn{layers=0}", "resnet18", 0),
]


def test_plain_and_gated_ffns_go() -> None:
    for name in ("vit", "llama", "t5"):
        result = apply(shared(name), "drop-ffn{layers='0-1'}")
        assert {b.kind for b in branches(result) if b.layer < 2 and "decoder" not in b.path} == {"attention"}, name
