"""Example inputs for a model, found from what it says about itself.

Nothing here names a model class. A model tells its inputs by an `example_inputs` of its own, by timm's
`pretrained_cfg`, or by the signature, `main_input_name` and `config` that transformers models carry.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from .builders import builder
from .configs import Asked, Config, cannot_infer, is_config
from .images import BATCH
from .input_text import Draw, Inputs, as_call, parse_inputs, unlike

__all__ = ["infer_inputs", "parse_inputs", "unlike"]


def infer_inputs(model: nn.Module, *, seed: int = 0) -> Inputs:
    """Example inputs `(args, kwargs)` with which `model(*args, **kwargs)` can be called.

    Taken from the first of: the model's own `example_inputs` or `example_input_array` (a value or a method
    without arguments: a tensor, a tuple of arguments, a dict of keyword arguments), timm's `pretrained_cfg` with
    the image size the model was built for, the `config` of a transformers model, and the first layer of an
    `nn.Sequential`. Batches hold 2 samples, token sequences 16, drawn from a generator with this `seed`; floats
    have the dtype, and all tensors the device, of the model's parameters. The model is not run.

    Raises:
        RewriteError: the model does not say what it takes; the line tells what to pass as `--inputs`.
    """
    for name in ("example_inputs", "example_input_array"):
        own = getattr(model, name, None)
        if own is not None and not isinstance(own, nn.Module):
            return as_call(own() if callable(own) else own, f"{type(model).__name__}.{name}")
    draw = Draw.like(model, seed)
    size = _image_size(model)
    if size is not None:
        return (draw.floats(BATCH, *size),), {}
    if is_config(getattr(model, "config", None)) and isinstance(getattr(model, "main_input_name", None), (str, list, tuple)):
        return (), _from_config(model, draw)
    if isinstance(model, nn.Sequential) and len(model):
        return infer_inputs(model[0], seed=seed)
    raise cannot_infer(model, "it does not say what it takes")


# ---- images: timm ----------------------------------------------------------------------------------------


def _image_size(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of a model that carries timm's `pretrained_cfg`, else None.

    The configuration describes the published weights; `in_chans=` and `img_size=` may have changed the model, so
    its layers are asked first.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, dict) else getattr(cfg, "input_size", None)
    if cfg is None or not isinstance(size, (tuple, list)) or len(size) != 3:
        return None
    channels, height, width = (int(n) for n in size)
    stem = cfg.get("first_conv") if isinstance(cfg, dict) else getattr(cfg, "first_conv", None)
    for path in [stem] if isinstance(stem, str) else list(stem or ()):
        layer = dict(model.named_modules()).get(path)
        if isinstance(layer, nn.Conv2d):
            channels = layer.in_channels
    for holder in (getattr(model, "patch_embed", None), model):
        built = getattr(holder, "img_size", None)
        if isinstance(built, int):
            return channels, built, built
        if isinstance(built, (tuple, list)) and len(built) == 2:
            return channels, int(built[0]), int(built[1])
    return channels, height, width


# ---- transformers ----------------------------------------------------------------------------------------


def _from_config(model: nn.Module, draw: Draw) -> dict[str, Any]:
    """Keyword arguments for a model with transformers' `config` and `main_input_name`."""
    config = Config(model.config)
    main: Any = model.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    parameters = inspect.signature(model.forward).parameters
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = [p.name for p in named if p.default is p.empty]
    wanted += [name for name in [*mains, *_other_modalities(config, mains[0])] if name in parameters]
    wanted = wanted or [p.name for p in named[:1]]
    if config.get("is_encoder_decoder") and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    for name, others in _BESIDE.items():
        wanted += [other for other in others if name in wanted and other in parameters]
    builders = {name: builder(name) for name in wanted}
    unknown = [name for name, found in builders.items() if found is None]
    if unknown or not wanted:
        raise cannot_infer(model, f"nothing is known about {', '.join(unknown or mains)}")
    asked = Asked(model, config, frozenset(parameters), draw)
    return {name: build(asked) for name, build in builders.items() if build is not None}


#: What is passed beside an input, though the signature has a default for it.
_BESIDE = {
    "qformer_input_ids": ("input_ids",),
    "input_ids": ("bbox", "attention_mask"),
    "input_features": ("input_features_mask",),
}


def _other_modalities(config: Config, main: str) -> Iterator[str]:
    """What a model such as CLIP takes beside its text.

    A language model with an encoder grafted on (LLaVA) has an id for the image's place in the text, and is called
    with text alone.
    """
    if main != "input_ids" or config.tokens(r"(image|video|audio|vision).*_(token_id|token_index)"):
        return
    kinds = " ".join(name for name, _ in config.sections())
    if "vision" in kinds or config.get("patch_size") is not None:
        yield "pixel_values"
    if "audio" in kinds or "speech" in kinds:
        yield "input_features"
