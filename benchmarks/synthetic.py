"""Models of published sizes with random weights, for speed alone: no zeros, no NaN, and nothing to download."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_opt import gemma
from gemma_opt.engine.packed import FloatRows, GridInput, Int4Rows, Int8Rows, LowRankRows, PackedLinear, Stacked
from gemma_opt.engine.weights import LayerWeights, TextShape, TextWeights

GROUP = 32


def text_config(model: str) -> Gemma3TextConfig:
    """The text model of a folder or a published size. KeyError for another name."""
    whole = gemma.read_config(Path(model)) if Path(model).is_dir() else gemma.named_config(model)
    config = whole.get_text_config()
    if not isinstance(config, Gemma3TextConfig):
        raise TypeError(f"{model} is no Gemma 3 text model")
    return config


def synthetic_model(shape: str, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """transformers' text model of that size, weights drawn in `dtype`."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Gemma3ForCausalLM(text_config(shape)).eval()
    finally:
        torch.set_default_dtype(previous)


def random_linear(stored: str, out: int, columns: int) -> PackedLinear:
    """Weights of about the size that keeps activations' size. stored: fp32, bf16, int8, int4, or with int8 inputs too."""
    size = columns**-0.5
    if stored in ("int8_dynamic", "int8_dynamic_int4"):
        rows = random_linear("int4" if stored.endswith("int4") else "int8", out, columns)
        assert isinstance(rows, Int8Rows | Int4Rows)
        return GridInput(rows, "int8_dynamic", None)
    if stored == "int8":
        scale = torch.full((out,), size / 74)  # 74: the deviation of uniform int8
        return Int8Rows(torch.randint(-127, 128, (out, columns), dtype=torch.int8), scale)
    if stored == "int4":
        scale = torch.full((out, columns // GROUP), size / 4.6, dtype=torch.bfloat16)
        zero = torch.full(scale.shape, 8, dtype=torch.uint8)
        return Int4Rows(torch.randint(0, 256, (out, columns // 2), dtype=torch.uint8), scale, zero)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stored]
    return FloatRows(torch.empty(out, columns, dtype=dtype).normal_(std=size))


def synthetic_weights(shape: str, stored: str) -> TextWeights:
    """Packed weights of that size. Integer formats have the int8 table; activations are float32."""
    config = text_config(shape)
    head_dim, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def layer(kind: str) -> LayerWeights:
        return LayerWeights(
            sliding=kind == "sliding_attention",
            input_norm=torch.ones(hidden),
            query_norm=torch.ones(head_dim),
            key_norm=torch.ones(head_dim),
            qkv=random_linear(stored, (heads + 2 * kv_heads) * head_dim, hidden),
            o=random_linear(stored, hidden, heads * head_dim),
            post_attention_norm=torch.ones(hidden),
            pre_mlp_norm=torch.ones(hidden),
            gate_up=random_linear(stored, 2 * intermediate, hidden),
            down=random_linear(stored, hidden, intermediate),
            post_mlp_norm=torch.ones(hidden),
        )

    table = random_linear("int8" if stored.startswith("int") else stored, config.vocab_size, hidden)
    if not isinstance(table, FloatRows | Int8Rows):
        raise TypeError("a table is float or int8")
    return TextWeights(
        shape=TextShape(
            hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocabulary=config.vocab_size,
            window=config.sliding_window or 0, eps=config.rms_norm_eps, attention_scale=config.query_pre_attn_scalar**-0.5,
            embedding_scale=hidden**0.5,
        ),
        dtype=torch.float32,
        table=table,
        layers=tuple(layer(kind) for kind in config.layer_types or ()),
        final_norm=torch.ones(hidden),
        head=table,
        sliding_frequencies=_frequencies(head_dim, 10_000.0),
        full_frequencies=_frequencies(head_dim, 1_000_000.0),
    )  # fmt: skip


def _frequencies(head_dim: int, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, head_dim, 2) / head_dim)


def bytes_read(weights: TextWeights) -> int:
    """Bytes of weights that one decode step reads, however many rows it has: the table is the head, and read whole."""

    def size(packed: PackedLinear) -> int:
        match packed:
            case Stacked():
                return sum(map(size, packed.parts))
            case LowRankRows():
                return size(packed.left) + size(packed.right)
            case GridInput():
                return size(packed.rows)
            case _:
                pass
        return sum(part.nbytes for part in vars(packed).values() if isinstance(part, Tensor))

    linears = sum(size(part) for layer in weights.layers for part in (layer.qkv, layer.o, layer.gate_up, layer.down))
    return linears + size(weights.head)
