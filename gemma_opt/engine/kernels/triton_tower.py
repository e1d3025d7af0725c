"""The vision tower's quantized linears by the kernels: a library product, and its scale, bias and GELU in one pass.

transformers' modules stay, with their tensors, for whoever inspects, saves or evaluates the model: only what they compute
with is put in place. Not for a tower that torch compiles: that fuses for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh

from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import Matrix
from gemma_opt.engine.kernels.triton_matrices import matrix_of, settled
from gemma_opt.engine.weights import pack_module
from gemma_opt.quantization.linear import RowsLinear


class TowerLinear:
    """A linear's forward: y = x · Wᵀ + bias, or its GELU. The tensors are those of the layer."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, *, gelu: bool) -> None:
        self._matrix, self._bias, self._gelu = matrix, bias, gelu

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype. Returns [..., out] in x's dtype."""
        with torch.cuda.device_of(x):  # Triton launches on the current one, and evaluation comes on threads of its own
            rows, x_scale = settled(self._matrix, x.flatten(0, -2))
            return multiply_by_library(self._matrix, rows, x_scale, self._bias, gelu=self._gelu).view(*x.shape[:-1], -1)


def speed_up_(tower: nn.Module) -> None:
    """Give each quantized linear with rowwise scales a `TowerLinear`, for inference on the device it lies on.

    One that a GELU follows takes it over. A tower that has them already stays as it is.
    """
    layers = {name: layer for name, layer in tower.named_modules() if isinstance(layer, RowsLinear) and not is_sped_up(layer)}
    for name, layer in layers.items():
        matrix = matrix_of(pack_module(layer))
        if matrix is None:
            continue
        mlp = tower.get_submodule(name.rpartition(".")[0])
        gelu = name.endswith(".fc1") and isinstance(mlp.get_submodule("activation_fn"), GELUTanh)
        if gelu:
            mlp.set_submodule("activation_fn", nn.Identity())
        vars(layer)["forward"] = TowerLinear(matrix, layer.bias, gelu=gelu)


def is_sped_up(layer: nn.Module) -> bool:
    """Whether `speed_up_` was here."""
    return isinstance(vars(layer).get("forward"), TowerLinear)
