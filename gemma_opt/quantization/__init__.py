"""Quantization: torchao makes the int8 weights, plain modules hold them."""

from gemma_opt.policy import stored_dtype
from gemma_opt.quantization.linear import Int8Linear
from gemma_opt.quantization.weights import empty_like_plan_, quantize_, sanitize_

__all__ = ["Int8Linear", "empty_like_plan_", "quantize_", "sanitize_", "stored_dtype"]
