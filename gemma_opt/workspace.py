"""What serving takes beside weights and KV cache on a GPU, worked out from what the engine allocates there, term by term.

A tier below the engine, so its sizes are repeated here; tests/test_sizing.py holds them against the engine's, and the whole
against what an H100 measured. Bytes that torch counts as allocated; reserved ones are more: a CUDA graph keeps what it used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemma_opt import gemma
from gemma_opt.policy import Plan, PlanRow, Role
from gemma_opt.recipe import FLOATS, TEXT_ROLES, Int4, Int8DynamicInt4

PICTURE_CACHE_BYTES = 32 * 2**20  # engine.pictures
PIECE_BYTES = 32 * 2**20  # engine.kernels.triton_library
ATTENTION_RUNS = 16  # engine.kernels.triton_attention.SPLITS
CHUNK_PARTS = 2 * 128 * 64  # twice enough programs with a large tile of rows (engine.kernels.triton_chunk)
LIBRARY_BYTES = 32 * 2**20  # torch's cuBLAS workspace of one stream on Hopper; 8 MiB on other GPUs
SAMPLER_BYTES = 45  # a token of the vocabulary beside its logit, in a step with every filter (engine.batch.Level.ALL)


@dataclass(frozen=True)
class Workspace:
    """Bytes by what they are for. The last three never exist at once: the largest counts.

    arranged: float32 norms, and scales with zero points of int4 as kernels read them, beyond the plan's bytes. rope: tables.
    step: logits, seen tokens and intermediates of all slots. recorded: inputs of recorded chunks and pictures. pictures: the
    cache of encoded ones, full. libraries: cuBLAS. prefill: one chunk. picture: one through the tower. sampling: all slots.
    """

    arranged: int
    rope: int
    step: int
    recorded: int
    pictures: int
    libraries: int
    prefill: int
    picture: int
    sampling: int

    @property
    def lasting(self) -> int:
        """What stays between requests once every kind has come."""
        return self.arranged + self.rope + self.step + self.recorded + self.pictures + self.libraries

    @property
    def passing(self) -> int:
        """What comes and goes, at most."""
        return max(self.prefill, self.picture, self.sampling)

    @property
    def total(self) -> int:
        """At the peak."""
        return self.lasting + self.passing


def workspace(config: gemma.GemmaConfig, planned: Plan, dtype: torch.dtype, context: int, slots: int, chunk: int) -> Workspace:
    """Of the fast engine. planned: of the finished model; chunk: the longest of prefill, in tokens."""
    text, size = config.get_text_config(), dtype.itemsize
    hidden, vocabulary, inner = text.hidden_size, text.vocab_size, text.num_attention_heads * text.head_dim
    gate = next(row for row in planned.rows if row.role is Role.GATE)
    channels = gate.shape[0] if not gate.name.endswith(".right") else text.intermediate_size
    soft_tokens = gemma.picture_tokens(config)
    rows = min(max(chunk, soft_tokens), context)
    partial = text.num_attention_heads * ATTENTION_RUNS * (text.head_dim + 2) * 4
    step = vocabulary * (4 + 1) + (2 * hidden + 2 * inner + channels) * size + partial
    vision = getattr(config, "vision_config", None)
    pixels = 0 if vision is None else 3 * vision.image_size**2 * size
    return Workspace(
        arranged=_arranged_bytes(config, planned, dtype),
        rope=2 * 2 * context * text.head_dim // 2 * 4,  # cosines and sines, of sliding and of full layers
        step=slots * step,
        recorded=rows * (hidden * size + 2 * 8) + vocabulary * 4 + pixels + soft_tokens * hidden * size,
        pictures=PICTURE_CACHE_BYTES if vision else 0,
        libraries=LIBRARY_BYTES,
        prefill=_prefill_bytes(config, gate, channels, dtype, rows),
        picture=_picture_bytes(config, planned, dtype),
        sampling=slots * vocabulary * SAMPLER_BYTES,
    )


def _arranged_bytes(config: gemma.GemmaConfig, planned: Plan, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    norms = text.num_hidden_layers * (4 * text.hidden_size + 2 * text.head_dim) * (4 - dtype.itemsize) + 4 * text.hidden_size
    return norms + sum(map(_word_bytes, planned.rows))


def _word_bytes(row: PlanRow) -> int:
    """A scale and a zero point are one word of 4 bytes; stored are 2, and 1 of groups that have a zero point of their own."""
    if row.role not in TEXT_ROLES or not isinstance(row.format, Int4 | Int8DynamicInt4):
        return 0
    return row.shape[0] * row.shape[1] // row.format.group * (4 - (2 if row.format.symmetric else 3))


def _prefill_bytes(config: gemma.GemmaConfig, gate: PlanRow, channels: int, dtype: torch.dtype, rows: int) -> int:
    """The larger of gate and up with GELU's result, and what attention's parts leave to be joined."""
    text, size = config.get_text_config(), dtype.itemsize
    hidden, heads, width = text.hidden_size, text.num_attention_heads, text.head_dim
    common = rows * (2 * hidden + 2 * (heads + text.num_key_value_heads) * width) * size
    products = rows * 2 * channels * size + max(_converted_bytes(gate, 2 * channels, hidden, dtype), rows * channels * size)
    attention = min(rows * heads * ATTENTION_RUNS, CHUNK_PARTS) * (width + 2) * 4
    return common + max(products, attention)


def _converted_bytes(row: PlanRow, outputs: int, inputs: int, dtype: torch.dtype) -> int:
    """Weights in `dtype` that exist for one product of many rows."""
    if isinstance(row.format, FLOATS):
        return 0
    return min(outputs, max(16, PIECE_BYTES // (inputs * dtype.itemsize) // 16 * 16)) * inputs * dtype.itemsize


def _picture_bytes(config: gemma.GemmaConfig, planned: Plan, dtype: torch.dtype) -> int:
    """In the tower's MLP: residual, input, both sides of the activation; where kernels make that in place, residual, input,
    both sides of the second product. And a converted weight; for int8 inputs their steps, as kernels and as the integer units
    read them, and the second product's sums.
    """
    vision, size = getattr(config, "vision_config", None), dtype.itemsize
    if vision is None:
        return 0
    patches = (vision.image_size // vision.patch_size) ** 2
    hidden, channels = vision.hidden_size, vision.intermediate_size
    stored = [row.format for row in planned.rows if row.role is Role.VISION and row.name.endswith(".fc1")]
    if any(isinstance(kind, FLOATS) for kind in stored):
        return patches * 2 * (hidden + channels) * size
    in_place = not any(isinstance(kind, Int4 | Int8DynamicInt4) for kind in stored)
    states = 3 * hidden + channels if in_place else 2 * (hidden + channels)
    if in_place and any(kind.activation.startswith("int8") for kind in stored):
        return patches * (states * size + channels * (size + 1) + hidden * 4)
    return patches * states * size + hidden * channels * size
