"""The vision tower's quantized linears by the kernels: a library product, and its scale, bias and GELU in one pass.

transformers' modules around them stay. Not for a tower that torch compiles: that fuses for itself.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import GELUTanh

from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import Matrix
from gemma_opt.engine.kernels.triton_matrices import matrix_of, settled
from gemma_opt.engine.weights import pack_module
from gemma_opt.quantization.linear import RowsLinear


class TowerLinear(nn.Module):
    """y = x · Wᵀ + bias, or its GELU. The tensors are those of the layer it stands for."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, *, gelu: bool) -> None:
        super().__init__()
        self._matrix, self._bias, self._gelu = matrix, bias, gelu

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype. Returns [..., out] in x's dtype."""
        rows, x_scale = settled(self._matrix, x.flatten(0, -2))
        return multiply_by_library(self._matrix, rows, x_scale, self._bias, gelu=self._gelu).view(*x.shape[:-1], -1)


def speed_up_(tower: nn.Module) -> None:
    """Put a `TowerLinear` in place of each quantized linear with rowwise scales, for inference on the device it lies on.

    One that a GELU follows takes it over.
    """
    layers = {name: layer for name, layer in tower.named_modules() if isinstance(layer, RowsLinear)}
    for name, layer in layers.items():
        matrix = matrix_of(pack_module(layer))
        if matrix is None:
            continue
        mlp = tower.get_submodule(name.rpartition(".")[0])
        gelu = name.endswith(".fc1") and isinstance(mlp.get_submodule("activation_fn"), GELUTanh)
        if gelu:
            mlp.set_submodule("activation_fn", nn.Identity())
        tower.set_submodule(name, TowerLinear(matrix, layer.bias, gelu=gelu))
