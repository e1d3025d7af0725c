"""How much a weight, a row or a layer matters. Small scores fall first."""

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Importance of each weight: |W|. weight: any shape. Returns the same shape, float32."""
    return weight.detach().float().abs()


def row_norm(weight: Tensor) -> Tensor:
    """Importance of each output row: its L2 norm. weight: [out, in]. Returns [out], float32."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32)


def rms(weight: Tensor) -> float:
    """Root mean square of all weights, ‖W‖_F / √n, accumulated in float64. weight: any shape, not empty."""
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64)) / weight.numel() ** 0.5


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Importance of each weight: |W| times the L2 norm of the input it multiplies.

    weight: [out, in]; input_norm: [in], over calibration tokens. Returns [out, in], float32. Compare within a row only: rows
    have different output scales. Source: Sun et al. 2023, arXiv:2306.11695.
    """
    return magnitude(weight) * input_norm


def channel(down: Tensor, input_rms: Tensor) -> Tensor:
    """Importance of each MLP channel: RMS of what it sends into down times the norm of the column it meets.

    down: [hidden, channels]; input_rms: [channels]. Returns [channels], float32.
    """
    return torch.linalg.vector_norm(down.detach(), dim=0, dtype=torch.float32) * input_rms
