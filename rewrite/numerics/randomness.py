"""Random layers made repeatable, each by itself: removing one leaves the draws of the others as they are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rewrite.graph.layers import ModalOperator, ScaledDotProductAttention
from rewrite.graph.nodes import is_random
from rewrite.graph.regions import Region
from rewrite.torch_private import _DropoutNd


@contextmanager
def seeded(module: nn.Module, seed: int) -> Iterator[None]:
    """Within the context, each random layer draws from a generator seeded by (seed, its path, number of its call).

    Anything else that draws uses the global generator, seeded with ``seed``. Generator states are restored. A call from a
    state of the generator that was there before, as when a backward computes a forward again, draws what was drawn then.
    """
    calls: Counter[str] = Counter()
    numbers: dict[tuple[str, bytes], int] = {}
    handles = [
        layer.register_forward_pre_hook(_reseed(path, seed, calls, numbers))
        for path, layer in module.named_modules()
        if path and draws(layer)
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _reseed(path: str, seed: int, calls: Counter[str], numbers: dict[tuple[str, bytes], int]) -> Any:
    def hook(layer: nn.Module, inputs: Any) -> None:
        place = (path, torch.get_rng_state().numpy().tobytes())
        if place not in numbers:
            numbers[place] = calls[path]
            calls[path] += 1
        text = f"{seed}/{path}/{numbers[place]}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    return hook


def draws(layer: nn.Module) -> bool:
    """Whether a layer of a layer graph may draw random numbers."""
    if isinstance(layer, ScaledDotProductAttention):
        return layer.dropout_p > 0
    if isinstance(layer, Region):
        return any(is_random(node) for graph in layer.graphs.values() for node in graph.nodes)
    return isinstance(layer, _DropoutNd | ModalOperator)
