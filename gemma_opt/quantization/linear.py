"""Linear layers with quantized weights, in plain tensors under the names that checkpoints use (`gemma_opt.layout`).

Plain tensors rather than torchao's subclasses: they save as they are, compile caches keep across torchao versions, and the
engine packs them as it likes. These forwards run anywhere and define what is right; in eager mode they rebuild the weight in
the activations' dtype at every call, which compilation fuses away and the engine's kernels avoid.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from gemma_opt.quantization.activations import quantize_input
from gemma_opt.quantization.grid import SYMMETRIC_ZERO, unpack_nibbles
from gemma_opt.recipe import Activation


class QuantizedLinear(nn.Module):
    """What all of them share. Every tensor is a buffer: nothing here is trained.

    bias: [out] or None. activation: what happens to the input before the product; "none" leaves it. input_scale: float32 [],
    for static activations, else None. Move such a layer with `.to(device)` only: `.to(dtype)` would round the scales.
    """

    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, bias: Tensor | None, activation: Activation, input_scale: Tensor | None = None) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        raise NotImplementedError

    def zeros(self) -> int:
        """How many weights are exactly zero."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], any float dtype. Returns [..., out] in x's dtype."""
        steps, scale = quantize_input(x, self.activation, self.input_scale)
        y = self.product(steps)
        if scale is not None:
            y = y * scale
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)  # in place: 35 MB less of a 4B's picture

    def product(self, x: Tensor) -> Tensor:
        """x · dequantized weightᵀ. x: [..., in], in its dtype or float32."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The figures nn.Linear prints, and the activation."""
        figures = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return figures if self.activation == "none" else f"{figures}, activation={self.activation}"


class RowsLinear(QuantizedLinear):
    """y = (x · weightᵀ) · weight_scale + bias: one scale per output row.

    weight: [out, in], its values exact in bfloat16; weight_scale: float32 [out].
    """

    weight: Tensor

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation: Activation = "none",
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__(bias, activation, input_scale)
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def product(self, x: Tensor) -> Tensor:
        """x · dequantized weightᵀ. Only the product and the result are rounded to x's dtype; scales are applied in float32."""
        return functional.linear(x, self.weight.to(x.dtype)).mul_(self.weight_scale)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        return self.weight.float() * self.weight_scale[:, None]

    def zeros(self) -> int:
        """How many weights are exactly zero."""
        return int((self.weight.float() == 0).sum())


class Int8Linear(RowsLinear):
    """Symmetric int8 weights, −128..127. activation: none, int8_dynamic or int8_static."""


class Fp8Linear(RowsLinear):
    """float8 e4m3 weights. activation: none, fp8_dynamic or fp8_static.

    This forward emulates: every value is one that fp8 hardware would see, the products are made in the activations' dtype.
    Right everywhere, fast nowhere.
    """

    def extra_repr(self) -> str:
        """The figures nn.Linear prints, the activation, and that nothing here is fast."""
        return f"{super().extra_repr()}, emulated"


class Int4Linear(QuantizedLinear):
    """y = x · ((nibble − zero) · weight_scale)ᵀ + bias, with scale and zero point of every group of neighbours in a row.

    weight_packed: uint8 [out, in/2], the even column in the low nibble; weight_scale: bfloat16 [out, in/group]; weight_zero:
    uint8 [out, in/group], 0..15, or None where every zero point is 8 (symmetric). activation: none or int8_dynamic.
    """

    weight_packed: Tensor
    weight_zero: Tensor | None

    def __init__(
        self,
        weight_packed: Tensor,
        weight_scale: Tensor,
        weight_zero: Tensor | None = None,
        bias: Tensor | None = None,
        activation: Activation = "none",
    ) -> None:
        super().__init__(bias, activation)
        self.register_buffer("weight_packed", weight_packed)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero", weight_zero)

    @property
    def in_features(self) -> int:
        return self.weight_packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        return self.weight_packed.shape[0]

    @property
    def group(self) -> int:
        """Neighbours in a row that share a scale."""
        return self.in_features // self.weight_scale.shape[1]

    def steps(self) -> Tensor:
        """nibble − zero as int8 [out, groups, group], −15..15: the weights in units of their scale."""
        zero = SYMMETRIC_ZERO if self.weight_zero is None else self.weight_zero.char()[..., None]
        return unpack_nibbles(self.weight_packed).char().unflatten(1, (-1, self.group)) - zero

    def product(self, x: Tensor) -> Tensor:
        """x · dequantized weightᵀ, the weight rounded to x's dtype."""
        return functional.linear(x, self.dequantize().to(x.dtype))

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        return (self.steps() * self.weight_scale.float()[..., None]).flatten(1)

    def zeros(self) -> int:
        """How many weights are exactly zero."""
        return int((self.steps() == 0).sum())

    def extra_repr(self) -> str:
        """The figures nn.Linear prints, and the group."""
        return f"{super().extra_repr()}, group={self.group}, symmetric={self.weight_zero is None}"
