"""Example images, whole or cut into patches, as a transformers configuration describes them.

Towers that take images of any size take them as rows of patches, with a table of how each image was cut: `grid_thw`
(frames, rows, columns), `spatial_shapes` (rows, columns) or the place of each patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .configs import Asked, Config

__all__ = ["BATCH", "grids", "merge_sizes", "patch_mask", "patch_places", "patches", "pixels", "shapes"]

# Export specialises sizes 0 and 1, and equal sizes may be taken for one dimension: keep them apart.
BATCH = 2
#: Rows and columns of patches of the two images that are cut.
_CUT = ((4, 4), (4, 3))
_PATCHES = 16


def pixels(asked: Asked) -> Tensor:
    """Images (batch, channels, height, width), with frames before the channels, or patches where the model takes these."""
    if asked.names & {"grid_thw", "image_grid_thw"}:
        return patches(asked)
    if asked.names & {"spatial_shapes", "pixel_position_ids"}:
        return asked.draw.floats(BATCH, _PATCHES, _values(asked.config))
    frames = asked.config.number("num_frames", "frames_per_clip", kind="vision", default=0)
    return asked.draw.floats(BATCH, *([frames] if frames else []), *_image(asked.config))


def _image(config: Config) -> tuple[int, int, int]:
    size = config.get("image_size", "input_size", "crop_size", kind="vision") or 224
    if isinstance(size, dict):
        size = (size.get("height", 224), size.get("width", 224))
    height, width = (size, size) if isinstance(size, int) else size
    return _channels(config), int(height), int(width)


def _channels(config: Config) -> int:
    return config.number("num_channels", "in_channels", "in_chans", "num_input_channels", kind="vision", default=3)


def _values(config: Config) -> int:
    """The numbers of one patch: channels × frames × height × width."""
    side = config.number("patch_size", "spatial_patch_size", kind="vision", default=16)
    return _channels(config) * config.number("temporal_patch_size", "patch_temporal", kind="vision", default=1) * side * side


def grids(asked: Asked) -> Tensor:
    """(2, 3): frames, rows and columns of patches of two images, whole groups of those that are merged."""
    merged = _merged(asked.config)
    return torch.tensor([[1, 2 * merged, 4 * merged], [1, 2 * merged, 2 * merged]], device=asked.draw.device)


def patches(asked: Asked) -> Tensor:
    """(patches of both images, numbers of one patch), in the order of `grids`."""
    return asked.draw.floats(12 * _merged(asked.config) ** 2, _values(asked.config))


def merge_sizes(asked: Asked) -> Tensor:
    """(2,): how many patches a side are merged into one token, for each image."""
    return torch.full((2,), _merged(asked.config), device=asked.draw.device)


def _merged(config: Config) -> int:
    size = config.get("spatial_merge_size", "merge_kernel_size", kind="vision")
    return math.lcm(*size) if isinstance(size, (list, tuple)) else size or 1


def shapes(asked: Asked) -> Tensor:
    """(batch, 2): rows and columns of patches of each image."""
    return torch.tensor(_CUT, device=asked.draw.device)


def patch_mask(asked: Asked) -> Tensor:
    """(batch, patches): 1 for the patches of `shapes`, 0 for padding; (batch, height, width) of ones for whole images."""
    if "spatial_shapes" not in asked.names:
        return torch.ones(BATCH, *_image(asked.config)[1:], dtype=torch.int64, device=asked.draw.device)
    mask = [[int(place < rows * columns) for place in range(_PATCHES)] for rows, columns in _CUT]
    return torch.tensor(mask, device=asked.draw.device)


def patch_places(asked: Asked) -> Tensor:
    """(batch, patches, 2): column and row of each patch of a square image."""
    side = math.isqrt(_PATCHES)
    places = torch.tensor([[place % side, place // side] for place in range(_PATCHES)], device=asked.draw.device)
    return places.expand(BATCH, -1, -1).contiguous()
