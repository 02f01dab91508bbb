"""What a model keeps for its backward as a picture: kinds before and after, ways of training, plans of several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    plans = found["frontier"].plans if "frontier" in found else ()
    count = 1 + bool(ways) + bool(plans)
    figure = new_figure(9, 2 + 0.4 * (len(ways) + _KINDS) + 4 * bool(plans))
    panels = iter(figure.subplots(count, 1, squeeze=False)[:, 0])
    kinds = list(dict.fromkeys(kind for memory in kept.values() for kind in memory.by_kind()))[:_KINDS][::-1]
    first = next(panels)
    _bars(first, kinds, {name: [memory.by_kind().get(k, 0) for k in kinds] for name, memory in kept.items()})
    first.set_title("kept for the backward, by kind")
    if ways:
        axes, ordered = next(panels), ways[::-1]
        _bars(axes, [w.name for w in ordered], {"kept": [w.bytes for w in ordered], "peak": [w.peak for w in ordered]})
        axes.set_title("a step of training")
    if plans:
        _frontier(next(panels), plans)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_picture(figure, file)


def _frontier(axes: Any, plans: Sequence[Mapping[str, Any]]) -> None:
    """What a step takes longer, and the noise that the gradient gets, over what is kept of eager."""
    kept = [plan["kept"] for plan in plans]
    axes.plot(kept, [1e3 * plan["seconds"] for plan in plans], "o-", label="time")
    axes.set(xlabel="kept, of what eager keeps", ylabel="ms more", title="the best plan of each size")
    axes.axvline(1.0, color="gray", linewidth=0.5)
    if any(plan["noise"] for plan in plans):
        other = axes.twinx()
        other.plot(kept, [plan["noise"] ** 0.5 for plan in plans], "s--", color="C1", label="noise")
        other.set_ylabel("noise in the gradient, estimated")
        axes.plot([], [], "s--", color="C1", label="noise")
    axes.legend()


def _bars(axes: Any, names: list[str], values: Mapping[str, list[int]]) -> None:
    """Horizontal bars, one of each series for every name, in MiB."""
    thick = 0.8 / max(len(values), 1)
    for place, (label, counts) in enumerate(values.items()):
        offsets = [row - place * thick for row in range(len(names))]
        axes.barh(offsets, [count / 2**20 for count in counts], thick, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("MiB")
    axes.legend()
