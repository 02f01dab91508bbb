"""What cannot be captured because of what became of it before: compiled, scripted or quantised models."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rewrite.errors import RewriteError

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "bitsandbytes", "torchao")


def check_capturable(model: nn.Module) -> None:
    """Raises RewriteError, with the way out, for a model that was compiled, scripted or quantised."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise RewriteError(f"this is a {name}, made by torch.jit: give the module that it was made from")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise RewriteError(
            f"this is a compiled model ({name}): give the module that torch.compile was called on, which it keeps as "
            "._orig_mod, and compile the result"
        )
    found = next(_packed(model), None)
    if found is not None:
        raise RewriteError(
            f"{found[0] or 'the model'} is quantised ({found[1]}), and its weights are packed out of sight: rewrite the "
            "model before it is quantised, and quantise the result"
        )


def _packed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The path and kind of each part whose weights are no plain tensors."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            yield path, f"{type(module).__module__}.{type(module).__name__}"
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_quantized or hasattr(tensor, "__tensor_flatten__") or type(tensor).__module__.startswith(_QUANTISED):
            yield path, f"{tensor.dtype}".removeprefix("torch.") if tensor.is_quantized else type(tensor).__name__
