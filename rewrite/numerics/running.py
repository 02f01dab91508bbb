"""Statistics of a stream of values: sums in float64, of fixed size however long the stream is."""

from __future__ import annotations

import math
from typing import Protocol

import torch


class Reducer(Protocol):
    """Takes in values of a stream, one after the other: those that belong together in one call."""

    def update(self, *values: torch.Tensor) -> None: ...


def rows(value: torch.Tensor, axis: int | None) -> torch.Tensor:
    """A value as a float64 matrix [elements, channels], one channel if ``axis`` is None."""
    wide = value.detach().double()
    return wide.reshape(-1, 1) if axis is None else wide.movedim(axis, -1).reshape(-1, wide.shape[axis])


class Moments:
    """Mean, variance, absolute mean, root mean square, smallest and largest of all values, or of each channel.

    ``axis`` is the channels' axis, or None for all values together. Results are float64 of shape [channels], or [].
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = 0
        self._mean = self._spread = self._absolute = torch.zeros(1, dtype=torch.float64)
        self._smallest, self._largest = torch.tensor(math.inf), torch.tensor(-math.inf)

    def update(self, *values: torch.Tensor) -> None:
        """Take in a value; its mean and deviation are joined with those before (Chan et al., 1983)."""
        for value in values:
            found = rows(value, self.axis)
            count, total = len(found), self.count + len(found)
            if not count:
                continue
            mean = found.mean(0)
            gap = mean - self._mean
            self._spread = self._spread + (found - mean).square().sum(0) + gap.square() * (self.count * count / total)
            self._mean = self._mean + gap * (count / total)
            self._absolute = self._absolute + (found.abs().mean(0) - self._absolute) * (count / total)
            self._smallest = torch.minimum(self._smallest, found.amin(0))
            self._largest = torch.maximum(self._largest, found.amax(0))
            self.count = total

    @property
    def mean(self) -> torch.Tensor:
        return self._shaped(self._mean)

    @property
    def variance(self) -> torch.Tensor:
        """The mean of (x - mean)²."""
        return self._shaped(self._spread / max(self.count, 1))

    @property
    def absolute(self) -> torch.Tensor:
        """The mean of |x|."""
        return self._shaped(self._absolute)

    @property
    def rms(self) -> torch.Tensor:
        """√(mean of x²)."""
        return (self.variance + self.mean.square()).sqrt()

    @property
    def smallest(self) -> torch.Tensor:
        return self._shaped(self._smallest)

    @property
    def largest(self) -> torch.Tensor:
        return self._shaped(self._largest)

    def _shaped(self, value: torch.Tensor) -> torch.Tensor:
        return value.reshape(()) if self.axis is None else value


class Quantiles:
    """Quantiles of all values, or of each channel, to the relative ``accuracy``: counts in bins of equal ratio.

    |x| is counted in the bin i with g^(i-1) < |x| <= g^i, g = (1 + a)/(1 - a); what is below 1e-12 counts as 0, what is
    above 1e12 as 1e12. Source: Masson et al., "DDSketch", VLDB 2019 (arXiv 1908.10693).
    """

    def __init__(self, axis: int | None = None, accuracy: float = 0.01) -> None:
        self.axis = axis
        self.ratio = (1 + accuracy) / (1 - accuracy)
        self.reach = math.ceil(math.log(1e12) / math.log(self.ratio))
        self.counts = torch.zeros(1, 4 * self.reach + 3, dtype=torch.int64)

    def update(self, *values: torch.Tensor) -> None:
        """Take in a value; numbers that are not finite are left out."""
        for value in values:
            found = rows(value, self.axis)
            channels, bins = found.shape[1], self.counts.shape[1]
            place = self._places(found) + bins * torch.arange(channels, device=found.device)
            counted = torch.bincount(place[found.isfinite()].cpu(), minlength=channels * bins).reshape(channels, bins)
            self.counts = self.counts + counted

    def _places(self, found: torch.Tensor) -> torch.Tensor:
        """The bin of each number: that of 0 in the middle, to both sides the powers of the ratio."""
        size = found.abs().nan_to_num(0.0)
        power = (size.clamp(1e-12, 1e12).log() / math.log(self.ratio)).ceil().long().clamp(-self.reach, self.reach)
        signed = (power + self.reach + 1) * found.sign().nan_to_num(0.0).long()
        return torch.where(size <= 1e-12, 0, signed) + 2 * self.reach + 1

    def at(self, share: float) -> torch.Tensor:
        """The value below which the ``share`` of all values lies, float64 of shape [channels], or []; nan without any."""
        total = self.counts.sum(1, keepdim=True)
        reached = self.counts.cumsum(1) > share * (total - 1)
        place = reached.long().argmax(1) - (2 * self.reach + 1)
        middle = 2 * self.ratio ** (place.abs().double() - self.reach - 1) / (1 + self.ratio)
        found = torch.where(place == 0, 0.0, middle * place.sign())
        found = torch.where(total[:, 0] > 0, found, math.nan)
        return found.reshape(()) if self.axis is None else found
