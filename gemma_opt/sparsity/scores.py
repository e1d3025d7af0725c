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
