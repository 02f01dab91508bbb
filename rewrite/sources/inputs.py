"""Example inputs for a model, found from what it says about itself.

Nothing here names a model class. A model tells its inputs by an `example_inputs` of its own, by timm's
`pretrained_cfg`, or by the signature, `main_input_name` and `config` that transformers models carry.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError

from .input_text import GRAMMAR, Draw, Inputs, as_call, parse_inputs, unlike

__all__ = ["infer_inputs", "parse_inputs", "unlike"]

# Export specialises sizes 0 and 1, and equal sizes may be taken for one dimension: keep them apart.
BATCH, LENGTH, DECODER_LENGTH = 2, 16, 12


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
    if _is_config(getattr(model, "config", None)) and isinstance(getattr(model, "main_input_name", None), str):
        return (), _from_config(model, draw)
    if isinstance(model, nn.Sequential) and len(model):
        return infer_inputs(model[0], seed=seed)
    raise _cannot_infer(model, "it does not say what it takes")


def _cannot_infer(model: nn.Module, why: str) -> RewriteError:
    parameters = inspect.signature(model.forward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    takes = f"forward takes ({', '.join(wanted)})" if wanted else "see its forward"
    return RewriteError(
        f"no example inputs for {type(model).__name__}: {why}; {takes}: "
        f"pass --inputs ({GRAMMAR}), or give the class an attribute `example_inputs`"
    )


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


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


@dataclass(frozen=True)
class _Config:
    """A configuration and its sections (`text_config`, `vision_config`, ...), asked together."""

    root: Any

    def sections(self, kind: str = "") -> list[tuple[str, Any]]:
        """The root and all nested configurations by name; those whose name holds `kind` follow the root first."""
        found = [("", self.root)]
        for _, config in found:
            found += [(name, value) for name, value in vars(config).items() if _is_config(value)]
        return [found[0], *sorted(found[1:], key=lambda pair: kind not in pair[0])]

    def get(self, *names: str, kind: str = "") -> Any:
        """The first of the settings `names` that is not None, the root's before a section's; None if there is none."""
        values = (getattr(config, name, None) for _, config in self.sections(kind) for name in names)
        return next((value for value in values if value is not None), None)

    def number(self, *names: str, kind: str = "", default: int) -> int:
        """As `get`, the first element of a sequence."""
        value = self.get(*names, kind=kind)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def tokens(self, pattern: str) -> dict[str, int]:
        """Settings such as `pad_token_id` whose name matches, with the ids they hold."""
        pairs = [pair for _, config in self.sections() for pair in vars(config).items()]
        return {name: n for name, n in pairs if type(n) is int and re.fullmatch(pattern, name)}


def _from_config(model: nn.Module, draw: Draw) -> dict[str, Any]:
    """Keyword arguments for a model with transformers' `config` and `main_input_name`."""
    config = _Config(model.config)
    main = str(model.main_input_name)
    parameters = inspect.signature(model.forward).parameters
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    wanted = [p.name for p in named if p.default is p.empty]
    wanted += [name for name in [main, *_other_modalities(config, main)] if name in parameters]
    if config.get("is_encoder_decoder") and "decoder_input_ids" in parameters:
        wanted.append("decoder_input_ids")
    if "input_ids" in wanted:
        wanted += [name for name in ("bbox", "attention_mask") if name in parameters]
    unknown = [name for name in dict.fromkeys(wanted) if name not in _BUILDERS]
    if unknown or not wanted:
        raise _cannot_infer(model, f"nothing is known about {', '.join(unknown) or main}")
    return {name: _BUILDERS[name](model, config, draw) for name in dict.fromkeys(wanted)}


def _other_modalities(config: _Config, main: str) -> Iterator[str]:
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


def _length(config: _Config, length: int, *limits: str) -> int:
    """`length`, less where the positions do not reach (some models keep the first two), more where chunks ask."""
    limit = config.number(*limits, default=length + 2)
    if limit > 0:
        length = max(2, min(length, limit - 2))
    if config.get("axial_pos_embds"):
        return math.prod(config.get("axial_pos_shape"))
    chunks = [config.number(name, default=1) for name in ("local_attn_chunk_length", "lsh_attn_chunk_length")]
    return -(-length // math.lcm(*chunks)) * math.lcm(*chunks)


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_source_positions")


def _token_ids(model: nn.Module, config: _Config, draw: Draw, length: int, kind: str) -> Tensor:
    """Ids of ordinary words that end with the end-of-text token: special ids change how a model masks and pools."""
    vocabulary = config.number("vocab_size", "n_words", kind=kind, default=0)
    if not vocabulary:
        raise _cannot_infer(model, "its configuration has no vocab_size")
    special = set(config.tokens(r".*token_(id|index)").values())
    words = torch.tensor([n for n in range(vocabulary) if n not in special] or [0])
    ids = words[draw.integers(0, len(words), BATCH, length).cpu()]
    eos = config.number("eos_token_id", kind=kind, default=-1)
    if 0 <= eos < vocabulary:
        ids[:, -1] = eos
    return ids.to(draw.device)


def _input_ids(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    return _token_ids(model, config, draw, _length(config, LENGTH, *_POSITIONS), "text")


def _decoder_input_ids(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    length = _length(config, DECODER_LENGTH, "max_target_positions", *_POSITIONS)
    return _token_ids(model, config, draw, length, "decoder")


def _attention_mask(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    """The last sample is padded at its end, so that a check of the outputs sees the mask at work."""
    mask = torch.ones(BATCH, _length(config, LENGTH, *_POSITIONS), dtype=torch.int64)
    mask[-1, -(mask.shape[1] // 4) :] = 0
    return mask.to(draw.device)


def _bbox(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    """Boxes (left, top, right, bottom) of the tokens on their page."""
    high = config.number("max_2d_position_embeddings", default=1000)
    return draw.integers(0, high, BATCH, _length(config, LENGTH, *_POSITIONS), 4).sort(-1).values


def _image(config: _Config) -> tuple[int, int, int]:
    size = config.get("image_size", "input_size", "crop_size", kind="vision") or 224
    if isinstance(size, dict):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else size
    channels = config.number("num_channels", "in_channels", "in_chans", "num_input_channels", kind="vision", default=3)
    return channels, int(height), int(width)


def _pixel_values(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    frames = config.number("num_frames", "frames_per_clip", kind="vision", default=0)
    return draw.floats(BATCH, *([frames] if frames else []), *_image(config))


def _input_values(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    """Sound: spectrogram frames, a wave with channels, or a plain wave long enough for 32 frames of features."""
    bins, frames = config.get("num_mel_bins"), config.get("max_length")
    strides = config.get("conv_stride")
    if bins and frames and not strides:
        return draw.floats(BATCH, frames, bins)
    stride = math.prod(strides) if strides else 320
    wave = draw.floats(BATCH, 32 * stride + 80)
    channels = config.number("audio_channels", default=1 if config.get("codebook_size") else 0)
    return wave[:, None].expand(-1, channels, -1).contiguous() if channels else wave


def _input_features(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    """Spectrogram features: (batch, bins, time) where the time is fixed, else (batch, time, bins)."""
    bins = config.number("num_mel_bins", kind="audio", default=0)
    frames = config.number("max_source_positions", kind="audio", default=0)
    if config.get("spec_size"):
        return draw.floats(BATCH, 1, 1024, bins)
    width = config.number("input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=0)
    if width or not bins:
        return draw.floats(BATCH, 64, width or 80)
    return draw.floats(BATCH, bins, 2 * frames) if frames else draw.floats(BATCH, 64, bins)


def _past_values(model: nn.Module, config: _Config, draw: Draw) -> Tensor:
    shape = config.number("context_length", default=64), config.number("num_input_channels", default=1)
    return draw.floats(BATCH, *shape)


_BUILDERS: dict[str, Callable[[nn.Module, _Config, Draw], Tensor]] = {
    "input_ids": _input_ids,
    "decoder_input_ids": _decoder_input_ids,
    "attention_mask": _attention_mask,
    "bbox": _bbox,
    "pixel_values": _pixel_values,
    "pixel_values_videos": _pixel_values,
    "input_values": _input_values,
    "input_features": _input_features,
    "past_values": _past_values,
}
