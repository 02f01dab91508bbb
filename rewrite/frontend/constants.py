"""Tensors that a model's code makes or keeps beside its parameters: named by what they hold, so that two traces agree.

torch.export numbers such tensors in the order of a trace. Evaluation may use one more or one less than training, and the
same number then stands for another tensor.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node

from rewrite.graph.nodes import attribute

_LARGEST = torch.finfo(torch.bfloat16).max


def name_constants(module: GraphModule, model: nn.Module) -> None:
    """Give each constant of a trace a name that follows from its content; the node carries it as ``meta["constant"]``."""
    registered = {name for name, _ in [*_tensors(model)]}
    names: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for node in module.graph.nodes:
        value = attribute(module, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(value, torch.Tensor) or str(node.target) in registered:
            continue
        if id(value) not in names:
            content = _content(value)
            names[id(value)] = f"constant_{content}_{seen[content]}"
            seen[content] += 1
        _rename(node, value, names[id(value)], model)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _rename(node: Node, value: torch.Tensor, name: str, model: nn.Module) -> None:
    if attribute(model, str(node.target)) is None:  # else a plain attribute of a module: its path is its name
        node.target = name
    node.meta["constant"] = value


def _content(value: torch.Tensor) -> str:
    """A digest of a tensor that does not change with the floating dtype of the model that made it.

    Floats are rounded to bfloat16, those beyond its range (a mask's ``finfo.min``) to its largest number.
    """
    digest = hashlib.sha256(repr((tuple(value.shape), value.is_floating_point())).encode())
    if type(value) in (torch.Tensor, nn.Parameter) and value.device.type != "meta":
        plain = value.detach().cpu()
        if plain.is_floating_point():
            plain = plain.float().clamp(-_LARGEST, _LARGEST).bfloat16().float()
        digest.update(repr(plain.tolist()).encode())
    return digest.hexdigest()[:12]
