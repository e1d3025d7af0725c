"""Quantization: how weights become int8, int4 or fp8, and the plain modules that hold them."""

from gemma_opt.quantization.activations import quantize_input
from gemma_opt.quantization.linear import Fp8Linear, Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.quantization.table import Int8Embedding, Int8Head, untie_head_
from gemma_opt.quantization.weights import empty_like_plan_, quantize_, sanitize_

__all__ = [
    "Fp8Linear",
    "Int4Linear",
    "Int8Embedding",
    "Int8Head",
    "Int8Linear",
    "QuantizedLinear",
    "empty_like_plan_",
    "quantize_",
    "quantize_input",
    "sanitize_",
    "untie_head_",
]
