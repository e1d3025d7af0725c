"""The linear layer with int8 weights, in plain tensors under the names that checkpoints use.

Plain tensors rather than torchao's subclass: they save as they are, compile caches keep across torchao versions, and the
engine packs them as it likes. This forward is the one that runs anywhere; in eager mode it rebuilds the weight in the
activations' dtype at every call, which compilation fuses away and the engine's kernels avoid.
"""

from torch import Tensor, nn
from torch.nn import functional


class Int8Linear(nn.Module):
    """y = (x · weightᵀ) · weight_scale + bias, with symmetric int8 weights and one scale per output row.

    weight: int8 [out, in]; weight_scale: float32 [out]; bias: [out] or None. All are buffers: nothing here is trained.
    Move it with `.to(device)` only: `.to(dtype)` would round the scales.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype. Returns [..., out] in x's dtype.

        int8 values are exact in bfloat16, so only the product is rounded; scale and bias are applied in float32.
        """
        y = functional.linear(x, self.weight.to(x.dtype)) * self.weight_scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        return self.weight * self.weight_scale[:, None]

    def extra_repr(self) -> str:
        """The figures nn.Linear prints."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
