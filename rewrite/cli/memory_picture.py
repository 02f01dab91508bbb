"""What a model keeps for its backward as a picture: ways of training beside each other, kinds before and after."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .measured import memories
from .pictures import check_picture, new_figure, write_picture

_KINDS = 12


def draw_memory(found: Mapping[str, Any], file: Path) -> None:
    """Write the picture. Raises RewriteError for another kind of file, and where matplotlib is not installed."""
    check_picture(file)
    kept = memories(found)
    ways = [way for way in found["ways"].rows if not way.problem] if "ways" in found else []
    figure = new_figure(9, 2 + 0.4 * (len(ways) + _KINDS))
    panels = figure.subplots(2 if ways else 1, 1, squeeze=False)[:, 0]
    kinds = list(dict.fromkeys(kind for memory in kept.values() for kind in memory.by_kind()))[:_KINDS][::-1]
    _bars(panels[0], kinds, {name: [memory.by_kind().get(k, 0) for k in kinds] for name, memory in kept.items()})
    panels[0].set_title("kept for the backward, by kind")
    if ways:
        ordered = ways[::-1]
        _bars(panels[1], [w.name for w in ordered], {"kept": [w.bytes for w in ordered], "peak": [w.peak for w in ordered]})
        panels[1].set_title("a step of training")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_picture(figure, file)


def _bars(axes: Any, names: list[str], values: Mapping[str, list[int]]) -> None:
    """Horizontal bars, one of each series for every name, in MiB."""
    thick = 0.8 / max(len(values), 1)
    for place, (label, counts) in enumerate(values.items()):
        offsets = [row - place * thick for row in range(len(names))]
        axes.barh(offsets, [count / 2**20 for count in counts], thick, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("MiB")
    axes.legend()
