"""rezero: the models the kit tries it on. Its gains by hand and its refusals stand with those of layerscale."""

from __future__ import annotations

from tests.passes.table import Row

ROWS = [
    Row("rezero{mode=new}", "EncoderLayer", 4),
    Row("rezero{init=0.5}", "EncoderLayer", 10),
    Row("rezero", "BatchNormTwice", 0),
]
