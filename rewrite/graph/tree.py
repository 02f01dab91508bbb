"""Questions and changes of a tree of modules: where each hangs, giving one the contents of another."""

from __future__ import annotations

from torch import nn


def adopt(layer: nn.Module, old: nn.Module) -> None:
    """Give ``layer`` the parameters, buffers and modules of ``old``, in ``old``'s order, the layer's own ones first
    where both have a name."""
    for kind in ("_parameters", "_buffers", "_modules"):
        ours, theirs = getattr(layer, kind), getattr(old, kind)
        merged = {k: (ours[k] if ours.get(k) is not None else v) for k, v in theirs.items()}
        merged.update({k: v for k, v in ours.items() if k not in merged})
        ours.clear()
        ours.update(merged)
    layer._non_persistent_buffers_set |= old._non_persistent_buffers_set
    layer.training = old.training


def holders(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs: a shared one has several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for name, child in module._modules.items():
            places.setdefault(id(child), []).append((module, name))
    return places
