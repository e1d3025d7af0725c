"""A Gemma 3 of a published size as a Q8_0 GGUF file with random weights, for llama.cpp: `python -m benchmarks.gpu.random_gguf`.

Speed does not ask what the weights say. There is no tokenizer in it: llama-bench feeds token ids.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic import text_config

BLOCK = 32  # weights of one Q8_0 block: a float16 scale, then 32 int8


def write(shape: str, path: Path, dtype: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0) -> None:
    """Write the text model of that size; matrices Q8_0, norms float32 around 1."""
    config = text_config(shape)
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name(f"random {shape}")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_freq_base(1_000_000.0)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        writer.add_tensor(name, random_q8_0(draw, outputs, inputs), raw_dtype=dtype)

    def norm(name: str, length: int) -> None:
        writer.add_tensor(name, draw.normal(1.0, 0.02, length).astype(np.float32))

    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    matrix("token_embd.weight", config.vocab_size, hidden)
    norm("output_norm.weight", hidden)
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}"
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"{block}.{name}.weight", hidden)
        norm(f"{block}.attn_q_norm.weight", head_dim)
        norm(f"{block}.attn_k_norm.weight", head_dim)
        matrix(f"{block}.attn_q.weight", heads, hidden)
        matrix(f"{block}.attn_k.weight", kv_heads, hidden)
        matrix(f"{block}.attn_v.weight", kv_heads, hidden)
        matrix(f"{block}.attn_output.weight", hidden, heads)
        matrix(f"{block}.ffn_gate.weight", config.intermediate_size, hidden)
        matrix(f"{block}.ffn_up.weight", config.intermediate_size, hidden)
        matrix(f"{block}.ffn_down.weight", hidden, config.intermediate_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_q8_0(draw: np.random.Generator, outputs: int, inputs: int) -> NDArray[np.uint8]:
    """Rows of Q8_0 blocks [outputs, inputs / 32 · 34] of about the size that keeps activations' size."""
    blocks = inputs // BLOCK
    data = np.empty((outputs, blocks, 2 + BLOCK), dtype=np.uint8)
    scale = np.float16(inputs**-0.5 / 74)  # 74: the deviation of uniform int8
    data[:, :, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    data[:, :, 2:] = draw.integers(0, 256, (outputs, blocks, BLOCK), dtype=np.uint8)
    return data.reshape(outputs, blocks * (2 + BLOCK))


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
