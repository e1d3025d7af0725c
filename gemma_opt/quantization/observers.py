"""How far the inputs of a linear reach: statistics over calibration tokens, and the scales they give.

A histogram of log₂|x| holds everything that the observers ask, in one pass and 20 kB a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.quantization.activations import limit_of, quantize_input
from gemma_opt.recipe import Activation, Observer

_OCTAVE = 64  # bins to a factor of two: 1.1 % wide
_LOWEST, _OCTAVES = -24, 44
PERCENTILE = 0.9999
_CANDIDATES = 160  # scales that `mse` tries, over three octaves and a half below the largest input


class Observed:
    """Inputs of one linear, as they come. channels: [in], the largest |x| of each; counts: of the histogram."""

    def __init__(self) -> None:
        self.channels: Tensor | None = None
        self.counts = torch.zeros(_OCTAVE * _OCTAVES, dtype=torch.float64)

    def add(self, x: Tensor, counts: Tensor | None = None) -> None:
        """x: [tokens, in]; counts: [tokens, 1], how much each token does; None: all alike."""
        size = x.detach().float().abs()
        peaks = size.amax(dim=0)
        self.channels = peaks if self.channels is None else torch.maximum(self.channels, peaks)
        bins = ((size.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _OCTAVE).long().clamp_(0, len(self.counts) - 1)
        shares = None if counts is None else counts.expand_as(bins).flatten().double()
        self.counts += torch.bincount(bins.flatten(), shares, minlength=len(self.counts)).cpu()

    def reach(self, observer: Observer, activation: Activation) -> float:
        """The largest |x| that a scale should represent. 1 where all inputs are zero."""
        peak = 0.0 if self.channels is None else float(self.channels.max())
        if not peak:
            return 1.0
        if observer == "absmax":
            return peak
        centers = 2.0 ** ((torch.arange(len(self.counts)) + 0.5) / _OCTAVE + _LOWEST)
        if observer == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            return min(peak, float(centers[int((share < PERCENTILE).sum())]))
        reaches = peak * 2.0 ** -torch.linspace(0, 3.5, _CANDIDATES)
        errors = [self._squared_error(centers, float(reach) / limit_of(activation), activation) for reach in reaches]
        return float(reaches[int(torch.tensor(errors).argmin())])

    def scale(self, observer: Observer, activation: Activation) -> Tensor:
        """The static scale, float32 []."""
        return torch.tensor(self.reach(observer, activation) / limit_of(activation), dtype=torch.float32)

    def _squared_error(self, centers: Tensor, scale: float, activation: Activation) -> float:
        steps, _ = quantize_input(centers, activation, torch.tensor(scale))
        return float(((steps * scale - centers).double().square() * self.counts).sum())
