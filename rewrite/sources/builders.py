"""What each input of a transformers model may hold, by its name in `forward`, as the configuration describes it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .configs import Asked, Config, cannot_infer
from .images import BATCH, grids, merge_sizes, patch_mask, patch_places, patches, pixels, shapes

LENGTH, DECODER_LENGTH = 16, 12

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_source_positions")
#: How wide the vectors of a sequence are.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def builder(name: str) -> Callable[[Asked], Tensor] | None:
    """What builds the input of that name; None where nothing is known about it."""
    found = _BUILDERS.get(name)
    endings = (build for ending, build in _ENDINGS.items() if name.endswith(ending))
    return found or next(endings, None)


# ---- text ------------------------------------------------------------------------------------------------


def _length(config: Config, length: int, *limits: str) -> int:
    """`length`, less where the positions do not reach (some models keep the first two), more where chunks ask."""
    limit = config.number(*limits, default=length + 2)
    if limit > 0:
        length = max(2, min(length, limit - 2))
    if config.get("axial_pos_embds"):
        return math.prod(config.get("axial_pos_shape"))
    chunks = [config.number(name, default=1) for name in ("local_attn_chunk_length", "lsh_attn_chunk_length")]
    return -(-length // math.lcm(*chunks)) * math.lcm(*chunks)


def _token_ids(asked: Asked, length: int, kind: str) -> Tensor:
    """Ids of ordinary words that end with the end-of-text token: special ids change how a model masks and pools."""
    config, draw = asked.config, asked.draw
    vocabulary = config.number("vocab_size", "n_words", kind=kind, default=0)
    if not vocabulary:
        raise cannot_infer(asked.model, "its configuration has no vocab_size")
    special = set(config.tokens(r".*token_(id|index)").values())
    words = torch.tensor([n for n in range(vocabulary) if n not in special] or [0])
    ids = words[draw.integers(0, len(words), BATCH, length).cpu()]
    eos = config.number("eos_token_id", kind=kind, default=-1)
    if 0 <= eos < vocabulary:
        ids[:, -1] = eos
    return ids.to(draw.device)


def _input_ids(asked: Asked) -> Tensor:
    return _token_ids(asked, _length(asked.config, LENGTH, *_POSITIONS), "text")


def _decoder_input_ids(asked: Asked) -> Tensor:
    length = _length(asked.config, DECODER_LENGTH, "max_target_positions", *_POSITIONS)
    return _token_ids(asked, length, "decoder")


def _attention_mask(asked: Asked) -> Tensor:
    return _padding(asked, _length(asked.config, LENGTH, *_POSITIONS))


def _padding(asked: Asked, length: int) -> Tensor:
    """The last sample is padded at its end, so that a check of the outputs sees the mask at work."""
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[-1, -(length // 4) :] = 0
    return mask.to(asked.draw.device)


def _bbox(asked: Asked) -> Tensor:
    """Boxes (left, top, right, bottom) of the tokens on their page."""
    high = asked.config.number("max_2d_position_embeddings", default=1000)
    return asked.draw.integers(0, high, BATCH, _length(asked.config, LENGTH, *_POSITIONS), 4).sort(-1).values


def _vectors(asked: Asked) -> Tensor:
    """(batch, length, width) in the place of embedded tokens; a tower that takes a grid with them takes patches."""
    if "grid_thw" in asked.names:
        return patches(asked)
    width = asked.config.number(*_WIDTHS, default=0)
    if not width:
        raise cannot_infer(asked.model, f"its configuration has none of {', '.join(_WIDTHS)}")
    return asked.draw.floats(BATCH, _length(asked.config, LENGTH, *_POSITIONS), width)


# ---- sound, series ---------------------------------------------------------------------------------------


def _input_values(asked: Asked) -> Tensor:
    """Sound: spectrogram frames, a wave with channels, or a plain wave long enough for 32 frames of features."""
    config, draw = asked.config, asked.draw
    bins, frames = config.get("num_mel_bins"), config.get("max_length")
    strides = config.get("conv_stride")
    if bins and frames and not strides:
        return draw.floats(BATCH, frames, bins)
    stride = math.prod(strides) if strides else 320
    wave = draw.floats(BATCH, 32 * stride + 80)
    channels = config.number("audio_channels", default=1 if config.get("codebook_size") else 0)
    return wave[:, None].expand(-1, channels, -1).contiguous() if channels else wave


def _input_features(asked: Asked) -> Tensor:
    """Spectrogram features: (batch, bins, time) where the time is fixed, else (batch, time, bins)."""
    config, draw = asked.config, asked.draw
    bins = config.number("num_mel_bins", kind="audio", default=0)
    if config.get("spec_size"):
        return draw.floats(BATCH, 1, 1024, bins)
    width = config.number(
        "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "input_feat_size", default=0
    )
    frames = 0 if width else config.number("max_source_positions", kind="audio", default=0)
    return draw.floats(BATCH, bins, 2 * frames) if bins and frames else draw.floats(BATCH, 64, width or bins or 80)


def _features_mask(asked: Asked) -> Tensor:
    """Which of the frames of `_input_features` are sound."""
    features = _input_features(asked)
    return _padding(asked, features.shape[2 if features.shape[1] != 64 else 1])


def _silence(asked: Asked) -> Tensor:
    """As `_features_mask`, of a model that is told the padding."""
    return _features_mask(asked) == 0


def _past_values(asked: Asked) -> Tensor:
    """A series: (batch, context, channels), or all that the lags of its model reach back, one channel without an axis."""
    lags = asked.config.get("lags_sequence")
    context = asked.config.number("context_length", "prediction_length", default=64)
    if not lags:
        return asked.draw.floats(BATCH, context, asked.config.number("num_input_channels", default=1))
    channels = asked.config.number("input_size", default=1)
    return asked.draw.floats(BATCH, context + max(lags), *([channels] if channels > 1 else []))


def _past_observed(asked: Asked) -> Tensor:
    return torch.ones_like(_past_values(asked))


def _past_time_features(asked: Asked) -> Tensor:
    """What is known of each past moment: (batch, past, features)."""
    past = _past_values(asked).shape[1]
    return asked.draw.floats(BATCH, past, asked.config.number("num_time_features", default=0))


_BUILDERS: dict[str, Callable[[Asked], Tensor]] = {
    "attention_mask": _attention_mask,
    "audio_mel": _input_features,
    "audio_mel_mask": _silence,
    "bbox": _bbox,
    "decoder_input_ids": _decoder_input_ids,
    "grid_thw": grids,
    "hidden_states": _vectors,
    "image_grid_thw": grids,
    "input_features": _input_features,
    "input_features_mask": _features_mask,
    "input_values": _input_values,
    "inputs": _vectors,
    "merge_sizes": merge_sizes,
    "past_observed_mask": _past_observed,
    "past_time_features": _past_time_features,
    "past_values": _past_values,
    "pixel_attention_mask": patch_mask,
    "pixel_position_ids": patch_places,
    "pixel_values_videos": pixels,
    "spatial_shapes": shapes,
}
#: Inputs of a kind: `qformer_input_ids`, `query_embeds`, `prompt_pixel_values`.
_ENDINGS: dict[str, Callable[[Asked], Tensor]] = {
    "input_ids": _input_ids,
    "pixel_values": pixels,
    "_embeds": _vectors,
    "_hidden_states": _vectors,
}
