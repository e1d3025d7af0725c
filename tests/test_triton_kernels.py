"""The Triton kernels under Triton's CPU interpreter, against float64, at sizes that fit no block.

The interpreter knows no bfloat16 arithmetic, so activations are float32 here, products too. What a GPU adds (bfloat16
products on matrix units) is checked by the tests marked `gpu` and by `python -m benchmarks.gpu kernels`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import DEVICE, fresh_model
from torch import Tensor
from torch.nn import functional
from triton.runtime.interpreter import interpreter_builder

from gemma_opt import inspection, pipeline
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import CHUNK_SIZES, RecordedPrefill, Recorder, chunk_sizes
from gemma_opt.engine.kernels import triton_attention, triton_chunk, triton_layer, triton_library
from gemma_opt.engine.kernels.triton_chunk import attend_to_slot, cut
from gemma_opt.engine.kernels.triton_decode import TritonDecode
from gemma_opt.engine.kernels.triton_grid import settle
from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import Blocks, Matrix, dequantize_int4, fit, multiply
from gemma_opt.engine.kernels.triton_matrices import TritonLinear, arrange, matrix_of
from gemma_opt.engine.kernels.triton_prefill import TritonPrefill
from gemma_opt.engine.kernels.triton_rows import widen
from gemma_opt.engine.kernels.triton_tower import is_sped_up, speed_up_
from gemma_opt.engine.kernels.triton_tuning import MANY, Tuning, _candidates_of_many, default_blocks, file_name
from gemma_opt.engine.linear import Visible, attend_to_chunk, gated_gelu, linear, rms_norm
from gemma_opt.engine.packed import (
    FloatRows,
    Fp8Rows,
    GridInput,
    Int4Halves,
    Int4Rows,
    Int8Rows,
    LowRankRows,
    PackedLinear,
    Stacked,
)
from gemma_opt.engine.rope import RopeTables, rope_table, rotate
from gemma_opt.engine.weights import TextWeights, take_weights
from gemma_opt.gemma import vision_tower
from gemma_opt.quantization import quantize_input
from gemma_opt.recipe import Activation, Recipe

BLOCKS = Blocks(outputs=32, inputs=64, stages=2)
CLOSE = 1e-5 if DEVICE.type == "cuda" else 1e-6  # a GPU's exponentials and square roots are good to 22 bits


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poison(*sizes: int) -> Tensor:
    """An output that shows every element nobody wrote."""
    return torch.full(sizes, float("nan"), device=DEVICE)


def matrix(kind: str, outputs: int, inputs: int) -> tuple[Matrix, Tensor]:
    """A random matrix of a format and what it stands for, float64."""
    draw = seeded(outputs + inputs)
    if kind.startswith("int4"):
        group = int(kind.removesuffix("z").split("-")[1])
        nibbles = torch.randint(0, 16, (outputs, inputs), generator=draw)
        scale = (torch.rand(outputs, inputs // group, generator=draw) + 0.5).to(torch.bfloat16)
        zero = torch.randint(0, 16, scale.shape, generator=draw).to(torch.uint8) if kind.endswith("z") else None
        packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
        offset = (8.0 if zero is None else zero.double()) * torch.ones(scale.shape, dtype=torch.float64)
        wide = [part.double().repeat_interleave(group, 1) for part in (offset, scale)]
        meant = (nibbles.double() - wide[0]) * wide[1]
        zero = None if zero is None else zero.to(DEVICE)
        stored = matrix_of(Int4Halves.of(Int4Rows(packed.to(DEVICE), scale.to(DEVICE), zero)))
        assert stored
        return stored, meant
    weight = torch.randn(outputs, inputs, generator=draw) * 30
    scale = None if kind in ("float32", "bfloat16") else torch.rand(outputs, generator=draw) + 0.5
    weight = weight.round().clamp(-127, 127).to(torch.int8) if kind == "int8" else weight.to(getattr(torch, kind))
    meant = weight.float().double() * (1.0 if scale is None else scale.double()[:, None])
    return Matrix(weight.to(DEVICE), inputs, None if scale is None else scale.to(DEVICE)), meant


def error(found: Tensor, meant: Tensor) -> float:
    """‖found − meant‖ / ‖meant‖ in float64; NaN if anything was left unwritten."""
    return float((found.cpu().double() - meant.cpu().double()).norm() / meant.cpu().double().norm())


SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}  # that a program may have on an L40S and on an H100
KINDS = ["float32", "bfloat16", "int8", "float8_e4m3fn", "int4-32", "int4-64z", "int4-128"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 33, 269), (3, 67, 384), (16, 32, 128), (40, 50, 256)])
def test_product_of_every_format(kind: str, rows: int, outputs: int, inputs: int) -> None:
    if kind.startswith("int4"):
        inputs = inputs // 128 * 128
    stored, meant = matrix(kind, outputs, inputs)
    x = torch.randn(rows, inputs, generator=seeded(rows))
    out = poison(1, rows, outputs)
    multiply(stored, x.to(DEVICE), out, BLOCKS)
    assert error(out[0], x.double() @ meant.T) < CLOSE


@pytest.mark.parametrize("kind", ["int8", "int4-32z"])
@pytest.mark.parametrize("splits", [2, 4])
def test_partial_results_add_up(kind: str, splits: int) -> None:
    """320 columns are five steps of 64: the last of four splits has nothing to do."""
    stored, meant = matrix(kind, 40, 320)
    x = torch.randn(3, 320, generator=seeded())
    out = poison(splits, 3, 40)
    multiply(stored, x.to(DEVICE), out, replace(BLOCKS, splits=splits))
    assert error(out.sum(0), x.double() @ meant.T) < CLOSE


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4-32z", "int4-64"])
def test_gated_product(kind: str) -> None:
    stored, meant = matrix(kind, 2 * 35, 192)
    x = torch.randn(3, 192, generator=seeded()) / 300
    out = poison(1, 3, 35)
    multiply(stored, x.to(DEVICE), out, BLOCKS, gated=True)
    gate, up = (x.double() @ meant.T).chunk(2, dim=-1)
    assert error(out[0], functional.gelu(gate, approximate="tanh") * up) < 10 * CLOSE


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    stored, _ = matrix(kind, 40, 256)
    x = torch.randn(16, 256, generator=seeded()).to(DEVICE)
    whole = poison(2, 16, 40)
    multiply(stored, x, whole, replace(BLOCKS, splits=2))
    for begin, rows in ((0, 1), (5, 3), (8, 8)):
        part = poison(2, rows, 40)
        multiply(stored, x[begin : begin + rows], part, replace(BLOCKS, splits=2))
        assert torch.equal(part, whole[:, begin : begin + rows])


def test_a_gated_product_cannot_be_split() -> None:
    stored, _ = matrix("int8", 64, 256)
    with pytest.raises(ValueError, match="partial results"):
        multiply(stored, torch.zeros(1, 256, device=DEVICE), poison(2, 1, 32), replace(BLOCKS, splits=2), gated=True)


def test_a_program_fits_the_memory_of_its_gpu_by_fewer_stages_then_fewer_rows() -> None:
    def fitted(dtype: torch.dtype, rows: int, kilobytes: int) -> tuple[int, int]:
        return fit(Matrix(torch.empty(64, 256, dtype=dtype), 256), Blocks(), rows, dtype, 1024 * kilobytes)

    assert fitted(torch.bfloat16, 16, 99) == (16, 4)
    assert fitted(torch.bfloat16, 64, 99) == (64, 3)
    assert fitted(torch.float32, 64, 99) == (64, 2)
    assert fitted(torch.float32, 64, 64) == (32, 2)
    assert fitted(torch.float32, 64, 227) == (64, 3)
    assert fitted(torch.float32, 16, 1) == (8, 2)  # less there is not: Triton will say what is missing


@pytest.mark.parametrize("has_scale", [False, True])
def test_embedding_and_first_norm(has_scale: bool) -> None:
    draw = seeded()
    table = torch.randint(-127, 128, (50, 70), generator=draw).to(torch.int8 if has_scale else torch.float32)
    scale, norm = torch.rand(50, generator=draw), torch.randn(70, generator=draw)
    tokens = torch.tensor([49, 0, 7])
    residual, normed = poison(3, 70), poison(3, 70)
    triton_layer.embed(
        tokens.to(DEVICE), table.to(DEVICE), scale.to(DEVICE) if has_scale else None, norm.to(DEVICE), residual, normed,
        embedding_scale=8.4, eps=1e-6,
    )  # fmt: skip
    meant = table[tokens].double() * (scale[tokens, None].double() if has_scale else 1.0) * 8.4
    assert error(residual, meant) < CLOSE
    assert error(normed, rms_norm(meant.float(), norm, 1e-6)) < CLOSE


def test_residual_and_norms() -> None:
    draw = seeded()
    partial, residual = torch.randn(3, 5, 70, generator=draw), torch.randn(5, 70, generator=draw)
    post, following = torch.randn(70, generator=draw), torch.randn(70, generator=draw)
    found, normed = residual.clone().to(DEVICE), poison(5, 70)
    triton_layer.add_norm(partial.to(DEVICE), post.to(DEVICE), found, following.to(DEVICE), normed, eps=1e-6)
    meant = residual + rms_norm(partial.sum(0), post, 1e-6)
    assert error(found, meant) < CLOSE
    assert error(normed, rms_norm(meant, following, 1e-6)) < CLOSE


def test_queries_and_keys_are_rotated_and_values_are_as_they_were() -> None:
    heads, kv_heads, head_dim = 4, 2, 48
    draw = seeded()
    partial = torch.randn(2, 3, (heads + 2 * kv_heads) * head_dim, generator=draw)
    query_norm, key_norm = torch.randn(head_dim, generator=draw), torch.randn(head_dim, generator=draw)
    slots, positions = torch.tensor([2, 0, 2]), torch.tensor([13, 4, 14])
    cos, sin = rope_table(torch.rand(head_dim // 2, generator=draw), 20)
    made = poison(3, heads + 2 * kv_heads, head_dim)
    given = (part.to(DEVICE) for part in (partial, slots, positions, query_norm, key_norm, cos, sin))
    triton_layer.make_heads(triton_layer.Heads(*given, 1e-6), made, kv_heads=kv_heads)
    q, k, v = partial.sum(0).view(3, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    turned = (cos[positions], sin[positions])
    meant = (rotate(rms_norm(q, query_norm, 1e-6), *turned), rotate(rms_norm(k, key_norm, 1e-6), *turned), v)
    assert error(made, torch.cat(meant, dim=1)) < CLOSE


@pytest.mark.parametrize("last", [None, 1, 12])
def test_keys_and_values_are_stored_where_the_ring_has_room_for_them(last: int | None) -> None:
    """All rows of several slots; or of one chunk all but its junk, and no more than the ring holds."""
    heads, kv_heads, head_dim, length = 3, 2, 48, 10
    rows = 4 if last is None else last + 4
    made = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=seeded())
    slots = torch.tensor([2, 0, 2, 2]) if last is None else torch.full((rows,), 1)
    positions = torch.tensor([13, 4, 14, 14]) if last is None else torch.arange(7, 7 + rows)
    made[-1] = made[-2]  # as where rows fill a step up
    keys, values = (torch.randn(3, kv_heads, length, head_dim, generator=seeded(1)) for _ in range(2))
    found = [part.to(DEVICE) for part in (keys, values)]
    newest = None if last is None else torch.tensor([last], device=DEVICE)
    triton_layer.store_heads(*(part.to(DEVICE) for part in (made, slots, positions)), *found, newest)
    for row in range(rows if last is None else last + 1):
        place = slots[row], slice(None), positions[row] % length
        keys[place], values[place] = made[row, heads : heads + kv_heads], made[row, heads + kv_heads :]
    assert torch.equal(found[0].cpu(), keys)
    assert torch.equal(found[1].cpu(), values)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 48), (3, 1, 32)])
def test_attention_reads_the_valid_positions_and_nothing_else(
    window: int | None, heads: int, kv_heads: int, head_dim: int, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else lies in the cache is NaN: one value too many and the result is too. The last row is there twice, as in a
    step with fewer requests than rows.
    """
    length = 300 if window is None else 110
    slots, positions = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 63, 64, 299, 299])
    rows = len(slots)
    draw = seeded()
    partial = torch.randn(2, rows, (heads + 2 * kv_heads) * head_dim, generator=draw)
    partial[:, 4] = partial[:, 3]
    query_norm, key_norm = torch.randn(head_dim, generator=draw), torch.randn(head_dim, generator=draw)
    cos, sin = rope_table(torch.rand(head_dim // 2, generator=draw), 300)
    turned = (cos[positions], sin[positions])
    query, key, value = partial.sum(0).view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    query = rotate(rms_norm(query, query_norm, 1e-6), *turned)
    key = rotate(rms_norm(key, key_norm, 1e-6), *turned)
    keys, values = (torch.full((4, kv_heads, length, head_dim), float("nan")) for _ in range(2))
    meant_keys, meant_values = keys.clone(), values.clone()
    meant = torch.empty(rows, heads, head_dim, dtype=torch.float64)
    for row in range(4):
        slot, position = int(slots[row]), int(positions[row])
        begin = 0 if window is None else max(0, position - window + 1)
        places = torch.arange(begin, position + 1) % length
        for cache, meant_cache, own in ((keys, meant_keys, key[row]), (values, meant_values, value[row])):
            cache[slot, :, places[:-1]] = torch.randn(kv_heads, position - begin, head_dim, generator=draw)
            meant_cache[slot] = cache[slot]
            meant_cache[slot, :, places[-1]] = own
        meant[row] = functional.scaled_dot_product_attention(
            query[row][:, None].double(), meant_keys[slot, :, places].double(), meant_values[slot, :, places].double(),
            scale=0.3, enable_gqa=True,
        )[:, 0]  # fmt: skip
    meant[4] = meant[3]
    parts = (part.to(DEVICE) for part in (partial, slots, positions, query_norm, key_norm, cos, sin))
    given = triton_layer.Heads(*parts, 1e-6)
    found_keys, found_values = keys.to(DEVICE), values.to(DEVICE)
    if placed:
        made = poison(rows, heads + 2 * kv_heads, head_dim)
        triton_layer.make_heads(given, made, kv_heads=kv_heads)
        triton_layer.store_heads(made, given.slots, given.positions, found_keys, found_values)
    out, scratch = poison(rows, heads * head_dim), triton_attention.Scratch.empty(rows, heads, kv_heads, head_dim, DEVICE)
    triton_attention.attend(given, found_keys, found_values, out, scratch, scale=0.3, window=window, placed=placed)
    assert error(out.view_as(meant), meant) < CLOSE
    before = out.clone()
    out.fill_(torch.nan)
    if DEVICE.type == "cpu":  # the second time the first run ends last, and joins them
        usual = interpreter_builder.set_grid_idx
        monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: usual(x, y, triton_attention.SPLITS - 1 - z))
    triton_attention.attend(given, found_keys, found_values, out, scratch, scale=0.3, window=window, placed=placed)
    assert torch.equal(out, before)
    for found, meant_cache in ((found_keys, meant_keys), (found_values, meant_values)):
        assert torch.equal(found.cpu().isnan(), meant_cache.isnan())
        assert error(found.nan_to_num(), meant_cache.nan_to_num()) < CLOSE


@pytest.mark.parametrize(
    ("group", "columns", "half"), [(32, 512, 128), (32, 384, 64), (64, 384, 64), (32, 96, 32), (128, 256, 128), (128, 384, 128)]
)
def test_rearranged_int4_weights_are_the_same_weights(group: int, columns: int, half: int) -> None:
    """384 columns are three groups of 128: the last block has an empty half."""
    draw = seeded()
    scale = (torch.rand(5, columns // group, generator=draw) + 0.5).to(torch.bfloat16)
    for zero in (None, torch.randint(0, 16, scale.shape, generator=draw).to(torch.uint8)):
        rows = Int4Rows(torch.randint(0, 256, (5, columns // 2), generator=draw).to(torch.uint8), scale, zero)
        halves = Int4Halves.of(rows)
        assert halves.half == half
        assert torch.equal(halves.dequantize(), rows.dequantize())


@pytest.mark.parametrize(("group", "has_zero"), [(32, True), (128, False)])
def test_int4_weights_dequantize_to_what_the_torch_operations_make_of_them(group: int, has_zero: bool) -> None:
    stored, meant = matrix(f"int4-{group}{'z' if has_zero else ''}", 35, 384)
    for rows in (slice(0, 35), slice(7, 30)):
        assert torch.equal(dequantize_int4(stored, torch.float32, rows).cpu().double(), meant[rows])


@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4-32z"])
def test_products_of_prefill_are_those_of_the_torch_operations(kind: str, rows: int) -> None:
    """Few rows and many take different ways, and so may what lies between; so do linears of unlike formats on one input."""
    stored, _ = matrix(kind, 48, 256)
    packed = packed_as(stored)
    both = Stacked((packed, FloatRows(torch.randn(7, 256, generator=seeded()).to(DEVICE))))
    x = torch.randn(rows, 256, generator=seeded(rows)).to(DEVICE)
    for tuning in (Tuning(torch.float32), tuned_for_many(stored, splits=1), tuned_for_many(stored, splits=2)):
        product = TritonLinear(tuning)
        assert error(product(packed, x), linear(packed, x)) < CLOSE
        assert error(product(both, x), linear(both, x)) < CLOSE
        assert error(product.partial(packed, x).sum(0), linear(packed, x)) < CLOSE


@pytest.mark.parametrize("rows", [5, 40, 70])
@pytest.mark.parametrize("kind", ["int8", "int4-32z"])
def test_gated_products_of_prefill_are_those_of_the_torch_operations(kind: str, rows: int) -> None:
    stored, _ = matrix(kind, 2 * 24, 256)
    packed = packed_as(stored)
    both = Stacked((packed, FloatRows(torch.randn(48, 256, generator=seeded()).to(DEVICE))))
    x = (torch.randn(rows, 256, generator=seeded(rows)) / 300).to(DEVICE)
    for tuning in (Tuning(torch.float32), tuned_for_many(stored, splits=1, gated=True)):
        for gate_up in (packed, both):
            assert error(TritonLinear(tuning).gated(gate_up, x), gated_gelu(linear(gate_up, x))) < 10 * CLOSE


def tuned_for_many(stored: Matrix, *, splits: int, gated: bool = False) -> Tuning:
    """As if these blocks were the fastest for chunks of every size, 128 rows a tile at most."""
    key, blocks = Tuning(torch.float32)._key, Blocks(32, 64, splits, 2, 2, 128)
    tuning = Tuning(torch.float32, {key(stored, gated, rows): blocks for rows in MANY})
    assert tuning.blocks_of_many(stored, 40, gated=gated) == blocks
    return tuning


@pytest.mark.parametrize("kind", ["int8", "int4-32z"])
def test_a_product_in_pieces_is_the_whole_product(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces have multiples of 16 outputs: 6,553 once left every row of a 4B's gate and up misaligned. And they are equal."""
    stored, meant = matrix(kind, 48, 256)
    x = torch.randn(70, 256, generator=seeded())
    monkeypatch.setattr(triton_library, "PIECE_BYTES", 23 * 4 * 256)
    assert triton_library._outputs_at_once(4 * 256) == 16
    assert error(multiply_by_library(stored, x.to(DEVICE)), x.double() @ meant.T) < CLOSE
    large = Matrix(torch.empty(20_480, 2560, dtype=torch.int8, device="meta"), 2560)
    assert [piece.start for piece in triton_library._pieces(large, 6544)] == [0, 5120, 10_240, 15_360]


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_widened_weights_are_the_same_numbers(kind: str) -> None:
    stored, _ = matrix(kind, 65, 70)
    assert torch.equal(widen(stored.weight, torch.bfloat16), stored.weight.to(torch.bfloat16))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("kind", ["float32", "int8", "float8_e4m3fn", "int4-32z"])
def test_a_product_by_the_library_ends_with_its_bias_and_activation(kind: str, gelu: bool) -> None:
    stored, meant = matrix(kind, 152, 256)
    x, bias = torch.randn(70, 256, generator=seeded()) / 300, torch.randn(152, generator=seeded(1))
    found = multiply_by_library(stored, x.to(DEVICE), bias=bias.to(DEVICE), gelu=gelu)
    wanted = x.double() @ meant.T + bias.double()
    assert error(found, functional.gelu(wanted, approximate="tanh") if gelu else wanted) < 10 * CLOSE


ACTIVATIONS: dict[str, tuple[Activation, ...]] = {
    "int8": ("int8_dynamic", "int8_static"), "float8_e4m3fn": ("fp8_dynamic", "fp8_static"), "int4-32z": ("int8_dynamic",)
}  # fmt: skip


@pytest.mark.parametrize("activation", ["int8_dynamic", "int8_static", "fp8_dynamic", "fp8_static"])
def test_inputs_on_a_grid_are_those_of_the_torch_operations_to_the_bit(activation: Activation) -> None:
    """Split partial results, a row of zeros, numbers at and beside every tie of the grid and beyond its end."""
    scale = torch.tensor(0.5, device=DEVICE) if "static" in activation else None
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat([part.nextafter(torch.tensor(end)) for part in (exact, ties) for end in (900.0, -900.0)])
    numbers = torch.cat([exact, ties, beside, torch.tensor([500.0, -1000.0]), torch.arange(-130, 130) / 4])
    x = torch.stack([numbers, torch.zeros_like(numbers), numbers.roll(7) / 3]).to(DEVICE)
    partial = torch.stack([x, torch.zeros_like(x)])
    steps, scales = poison(*x.shape), poison(3)
    settle(partial, activation, scale, steps, scales)
    meant, meant_scales = quantize_input(x, activation, scale)
    assert meant_scales is not None
    assert torch.equal(steps, meant)
    assert torch.equal(scales, meant_scales.flatten().expand(3))
    partial[0, 1, 5] = torch.nan
    settle(partial, activation, scale, steps, scales)
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_products_of_inputs_on_a_grid_and_of_low_rank(kind: str, rows: int) -> None:
    stored, _ = matrix(kind, 48, 256)
    right, _ = matrix("int8", 256, 64)
    packed = packed_as(stored)
    assert isinstance(packed, Int8Rows | Fp8Rows | Int4Halves)
    product = TritonLinear(Tuning(torch.float32))
    for activation in ACTIVATIONS[kind]:
        scale = torch.tensor(0.03, device=DEVICE) if "static" in activation else None
        grid = GridInput(packed, activation, scale)
        x = torch.randn(rows, 256, generator=seeded(rows)).to(DEVICE)
        assert error(product(grid, x), linear(grid, x)) < CLOSE
        thin = torch.randn(rows, 64, generator=seeded(rows)).to(DEVICE)
        both = LowRankRows(FloatRows(torch.randn(9, 256, generator=seeded()).to(DEVICE)), packed_as(right))
        assert error(product(both, thin), linear(both, thin)) < CLOSE


def test_a_gated_product_of_inputs_on_a_grid() -> None:
    """Scaled before the GELU, not after."""
    for kind in ("int8", "int4-32z"):
        stored, _ = matrix(kind, 2 * 35, 192)
        grid = GridInput(packed_as(stored), "int8_dynamic", None)  # type: ignore[arg-type]
        x = (torch.randn(3, 192, generator=seeded()) / 300).to(DEVICE)
        steps, scales, out = poison(3, 192), poison(3), poison(1, 3, 35)
        settle(x[None], "int8_dynamic", None, steps, scales)
        multiply(stored, steps, out, BLOCKS, x_scale=scales, gated=True)
        gate, up = linear(grid, x).double().chunk(2, dim=-1)
        assert error(out[0], functional.gelu(gate, approximate="tanh") * up) < 10 * CLOSE


def packed_as(stored: Matrix) -> PackedLinear:
    """The engine's form of a matrix: same tensors."""
    if stored.scale is None:
        return FloatRows(stored.weight)
    if stored.group:
        return Int4Halves(stored.weight, stored.scale, stored.group, stored.half, stored.in_features)
    rows = Int8Rows if stored.weight.dtype == torch.int8 else Fp8Rows
    return rows(stored.weight, stored.scale)


def test_default_blocks_fill_the_gpu_and_leave_every_split_work() -> None:
    def blocks(outputs: int, inputs: int, *, gated: bool = False) -> Blocks:
        return default_blocks(Matrix(torch.empty(outputs, inputs, dtype=torch.int8, device="meta"), inputs), gated=gated)

    assert blocks(2560, 10_240).splits == 4
    assert blocks(262_208, 2560).splits == 1
    assert blocks(20_480, 2560, gated=True).splits == 1
    assert blocks(64, 200).splits == 1


def test_few_blocks_are_tried_for_many_rows_and_none_where_results_would_fill_the_memory() -> None:
    def tried(outputs: int, rows: int, *, gated: bool = False) -> list[int]:
        stored = Matrix(torch.empty(outputs, 2560, dtype=torch.int8, device="meta"), 2560)
        return [blocks.splits for blocks in _candidates_of_many(stored, rows, gated=gated)]

    assert tried(2560, 64) == [2, 4, 4, 8, 4, 8, 8]
    assert tried(2560, 288) == [1, 2, 2, 4, 2, 4, 2, 4, 4, 8]
    assert tried(20_480, 288, gated=True) == [1] * 5
    assert tried(43_008, 288, gated=True) == [1] * 5, "a 27B's gate and up, of which half the width comes out"
    assert tried(262_208, 64) == []


def test_tuning_choices_are_kept_for_this_torch_triton_and_device(tmp_path: Path) -> None:
    stored, _ = matrix("int8", 40, 256)
    chosen = {"": Blocks(16, 256, 2, 2, 3), ":64 rows": Blocks(64, 128, 1, 4, 3)}
    kept = Tuning(torch.bfloat16, {f"{stored.key}:bfloat16{rows}": blocks for rows, blocks in chosen.items()})
    kept.save(tmp_path)
    assert (tmp_path / file_name()).is_file()
    assert Tuning.load(tmp_path, torch.bfloat16).blocks(stored) == Blocks(16, 256, 2, 2, 3)
    many = [Tuning.load(tmp_path, torch.bfloat16).blocks_of_many(stored, rows) for rows in (17, 64, 65)]
    assert many == [Blocks(64, 128, 1, 4, 3), Blocks(64, 128, 1, 4, 3), None]
    assert Tuning.load(tmp_path, torch.float32).blocks(stored) == default_blocks(stored, gated=False)
    assert Tuning.load(None, torch.bfloat16).blocks(stored) == default_blocks(stored, gated=False)


def packed_model(stored: str) -> TextWeights:
    """The bundled model's last two layers, one of each kind, float32 activations; int4 has the int8 table at both ends.

    mixed: formats stacked on one input, quantized inputs and low rank.
    """
    model = fresh_model()
    if stored == "int4":
        roles = {"vision": "fp32", "projector": "fp32", "embedding": "int8", "head": "tied"}
        base = {"base": "small-gemma3", "dtype": "float32"}
        tree = {"name": "test", "model": base, "quantization": {"default": {"format": "int4", "group": 32}, "roles": roles}}
        pipeline.compress(model, Recipe.from_tree(tree, "test"))
    if stored == "mixed":
        parts = {"value": "fp32", "up": {"format": "int4", "group": 32}, "down": "int8_dynamic"}
        roles = {"vision": "fp32", "projector": "fp32", **parts}
        base = {"base": "small-gemma3", "dtype": "float32"}
        low_rank = {"roles": ["output"], "ratio": 0.3, "whiten": False}
        tree = {"name": "test", "model": base, "quantization": {"default": "int8", "roles": roles}, "lowrank": low_rank}
        pipeline.compress(model, Recipe.from_tree(tree, "test"))
    weights = take_weights(model.to(DEVICE), release=True, arrange=arrange)
    return replace(weights, layers=weights.layers[-2:])


def after_prompts(weights: TextWeights, slack: int) -> tuple[TextModel, TextModel, TritonDecode]:
    """Two models whose slots have read 5 and 150 tokens, by torch operations, and the kernels' step on the second's cache."""
    caches = [KvCache(weights, slots=2, context=200, slack=slack) for _ in range(2)]
    expected, mine = (TextModel(weights, cache, use_kernels=False) for cache in caches)
    draw = seeded(3)
    for slot, count in ((0, 5), (1, 150)):
        ids = torch.randint(5, 400, (count,), generator=draw).to(DEVICE)
        for model in (expected, mine):
            model.prefill(slot, model.embed(ids), 0)
    return expected, mine, TritonDecode(weights, mine.cache, RopeTables.of(weights, 200), Tuning(weights.dtype))


def assert_same_caches(mine: TextModel, expected: TextModel) -> None:
    for found, meant in zip(mine.cache.layers, expected.cache.layers, strict=True):
        assert error(found.keys, meant.keys) < 10 * CLOSE
        assert error(found.values, meant.values) < 10 * CLOSE


@pytest.mark.parametrize("stored", ["fp32", "int4", "mixed"])
@torch.no_grad()
def test_whole_decode_step(stored: str) -> None:
    """Slots at unlike positions, one past the window: logits and cache as with torch operations, alone and together."""
    weights = packed_model(stored)
    assert [layer.sliding for layer in weights.layers] == [True, False]
    expected, mine, decode = after_prompts(weights, slack=0)
    draw = seeded(4)
    tokens, slots = torch.randint(5, 400, (2,), generator=draw).to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    positions = torch.tensor([150, 5], device=DEVICE)
    together = decode(tokens, slots, positions).clone()
    assert error(together, expected.decode(tokens, slots, positions)) < 10 * CLOSE
    assert_same_caches(mine, expected)
    alone = decode(tokens[:1], slots[:1], positions[:1])[0]
    assert torch.equal(alone, together[0])
    with pytest.raises(ValueError, match="3 rows"):
        decode(*(torch.zeros(3, dtype=torch.int64, device=DEVICE) for _ in range(3)))


@pytest.mark.parametrize("stored", ["fp32", "int4"])
@torch.no_grad()
def test_rows_that_guess_read_each_others_keys(stored: str) -> None:
    """Four rows of one slot across the end of its ring, and two of another; each row the same alone, after the others."""
    weights = packed_model(stored)
    expected, mine, decode = after_prompts(weights, slack=3)
    tokens = torch.randint(5, 400, (6,), generator=seeded(4)).to(DEVICE)
    slots, positions = (torch.tensor(part, device=DEVICE) for part in ([1, 1, 1, 1, 0, 0], [150, 151, 152, 153, 5, 6]))
    together = decode(tokens, slots, positions).clone()
    assert error(together, expected.decode(tokens, slots, positions)) < 10 * CLOSE
    assert_same_caches(mine, expected)
    for row in range(6):
        one = slice(row, row + 1)
        assert torch.equal(decode(tokens[one], slots[one], positions[one])[0], together[row])


@torch.no_grad()
def test_logits_of_a_split_head_are_added_up() -> None:
    """Whoever measures may find a head in two parts the fastest: the first part alone was once taken for the logits."""
    weights = packed_model("int4")
    head, rope = matrix_of(weights.head), RopeTables.of(weights, 20)
    assert head
    row = torch.tensor([7], device=DEVICE)
    chosen = ({}, {f"{head.key}:float32": Blocks(32, 64, 2, 2, 2)})
    steps = [
        TritonDecode(weights, KvCache(weights, slots=1, context=20), rope, Tuning(weights.dtype, blocks)) for blocks in chosen
    ]
    whole, split = (step(row, row * 0, row * 0) for step in steps)
    assert error(split, whole) < CLOSE


@pytest.mark.parametrize(("stored", "close"), [("int8", 10 * CLOSE), ("fp8", 10 * CLOSE), ("int8_dynamic", 1e-3)])
@torch.no_grad()
def test_a_vision_tower_by_kernels_sees_what_the_torch_operations_see(stored: str, close: float) -> None:
    """Where an input lies between two steps of a grid, its last bit decides."""
    model = fresh_model()
    base = {"base": "small-gemma3", "dtype": "float32"}
    tree = {"name": "test", "model": base, "quantization": {"default": "fp32", "roles": {"vision": stored}}}
    plan = pipeline.compress(model, Recipe.from_tree(tree, "test"))
    tower = vision_tower(model.to(DEVICE))
    assert tower
    before = inspection.measure(model, plan), set(model.state_dict())
    side = model.config.vision_config.image_size
    pixels = torch.rand(1, 3, side, side, generator=seeded()).to(DEVICE)
    meant = tower(pixels).last_hidden_state
    layers = model.config.vision_config.num_hidden_layers
    for _ in range(2):  # of one model there may be two engines
        speed_up_(tower)
        assert sum(map(is_sped_up, tower.modules())) == 6 * layers
        assert error(tower(pixels).last_hidden_state, meant) < close
    assert (inspection.measure(model, plan), set(model.state_dict())) == before, "a report measures what served"


Cut = tuple[int, int, list[tuple[int, int]]]  # begin and end of a chunk, and its pictures


@pytest.mark.parametrize(
    ("stored", "slack", "cuts"),
    [
        ("fp32", 0, [(0, 1, [])]),
        ("int4", 0, [(0, 20, [(3, 19)]), (20, 33, [])]),
        ("mixed", 0, [(0, 18, [(2, 8), (10, 16)]), (18, 30, []), (30, 48, [(35, 45)])]),  # the ring of 24 wraps within chunks
        ("fp32", 3, [(0, 20, []), (20, 33, [])]),
        ("fp32", 0, [(0, 27, []), (27, 40, [])]),  # more than a ring holds
    ],
)
@torch.no_grad()
def test_recorded_chunks_give_what_plain_ones_give(stored: str, slack: int, cuts: list[Cut]) -> None:
    """Logits and all that the cache holds, in a slot that held something else before, up to the end of the context."""
    weights = packed_model(stored)
    weights = replace(weights, shape=replace(weights.shape, window=24))
    assert [layer.sliding for layer in weights.layers] == [True, False]
    expected, mine = (TextModel(weights, KvCache(weights, slots=2, context=48, slack=slack), use_kernels=False) for _ in "ab")
    step = TritonPrefill(weights, mine.cache, mine.rope, Tuning(weights.dtype))
    read = RecordedPrefill(step, weights, mine.cache, 27, Recorder(DEVICE))
    ids = torch.randint(5, 400, (48,), generator=seeded(4)).to(DEVICE)
    for model in (expected, mine):
        model.prefill(1, model.embed(ids.flip(0)[:40]), 0)
    spans = [span for _, _, pictures in cuts for span in pictures]
    for begin, end, _ in cuts:
        meant = expected.prefill(1, expected.embed(ids[begin:end]), begin, spans)
        assert error(read(1, mine.embed(ids[begin:end]), begin, spans), meant) < 10 * CLOSE
    with pytest.raises(ValueError, match="beyond the context"):
        read(1, mine.embed(ids[:8]), 41)
    with pytest.raises(ValueError, match="tears"):
        read(1, mine.embed(ids[:8]), 0, [(6, 9)])
    for layer in mine.cache.layers:  # where recording left something
        layer.keys[0, :, 0] = layer.values[0, :, 0] = 0
    assert_same_caches(mine, expected)


def test_recordings_serve_chunks_of_any_length() -> None:
    assert chunk_sizes(512) == (16, 32, 64, 128, 288, 512)
    assert chunk_sizes(100) == (16, 32, 64, 100)
    assert chunk_sizes(1) == (1,)


@pytest.mark.parametrize(("window", "length"), [(None, 130), (37, 130), (37, 40)])
@pytest.mark.parametrize(
    ("start", "tokens", "spans"), [(0, 1, []), (0, 70, [(3, 40), (41, 69)]), (75, 35, [(80, 100)]), (90, 7, [])]
)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 48), (3, 1, 32)])
def test_a_chunk_attends_to_what_its_positions_window_and_pictures_let_it_see(
    heads: int, kv_heads: int, head_dim: int, start: int, tokens: int, spans: list[tuple[int, int]], window: int | None,
    length: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever nobody may read is NaN: other slots, and all but the window before the chunk. Keys in parts, and in one."""
    draw = seeded()
    end = start + tokens
    made = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=draw)
    query, key, value = made.split([heads, kv_heads, kv_heads], dim=1)
    old = torch.randn(2, kv_heads, start, head_dim, generator=draw)
    cached = torch.full((2, 3, kv_heads, length, head_dim), float("nan"))
    kept = torch.arange(0 if window is None else max(0, start - window + 1), start)
    cached[:, 1, :, kept % length] = old[:, :, kept]
    pictures = torch.zeros(end, dtype=torch.int64)
    for number, (begin, stop) in enumerate(spans, start=1):
        pictures[begin:stop] = number
    position, other = torch.arange(start, end)[:, None], torch.arange(end)
    seen = (other <= position) | ((pictures[start:, None] > 0) & (pictures[start:, None] == pictures))
    if window is not None:
        seen &= other > position - window
    keys, values = (torch.cat((before, own.transpose(0, 1)), 1).double() for before, own in zip(old, (key, value), strict=True))
    meant = functional.scaled_dot_product_attention(
        query.double().transpose(0, 1), keys, values, seen, scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    given = [part.to(DEVICE) for part in (made, torch.tensor([1]), position[:, 0], pictures[start:], *cached)]
    for enough in (triton_chunk.ENOUGH_PROGRAMS, 1):
        monkeypatch.setattr(triton_chunk, "ENOUGH_PROGRAMS", enough)
        assert error(attend_to_slot(*given, scale=0.3, window=window).view_as(meant), meant) < CLOSE


def test_a_chunks_attention_keeps_a_large_gpu_busy() -> None:
    for tokens in CHUNK_SIZES:
        rows, splits = cut(2 * tokens, 4, wgmma=True)
        assert -(-2 * tokens // rows) * 4 * splits >= 128
    assert cut(576, 4, wgmma=True) == (64, 4)
    assert cut(576, 4, wgmma=False) == (16, 1)


@pytest.mark.parametrize("begins", [(0, 0, 0), (0, 31, 64)])
def test_chunks_of_any_length_attend_to_what_they_see(begins: tuple[int, ...]) -> None:
    """97 keys, of which the last tokens do not see the first 64: whole blocks of them, for a fused kernel."""
    draw = seeded()
    query, (keys, values) = torch.randn(3, 4, 64, generator=draw), torch.randn(2, 2, 97, 64, generator=draw)
    seen = [torch.arange(97).ge(begin) & torch.arange(97).lt(95 + row) for row, begin in enumerate(begins)]
    meant = functional.scaled_dot_product_attention(
        query.double().transpose(0, 1), keys.double(), values.double(), torch.stack(seen), scale=0.2, enable_gqa=True
    ).transpose(0, 1)
    visible = Visible(torch.tensor(begins, device=DEVICE), torch.arange(95, 98, device=DEVICE), 2, torch.float32)
    found = attend_to_chunk(query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), visible, 0.2)
    assert error(found, meant) < 10 * CLOSE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no bfloat16 arithmetic")
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8_e4m3fn", "int4-32z", "int4-128"])
def test_bfloat16_products_on_a_gpu(kind: str) -> None:
    """A row's bits are the same for 1 to 16 rows; errors are those of bfloat16 operands."""
    stored, meant = matrix(kind, 2560, 2048)
    blocks = default_blocks(stored, gated=False)
    x = torch.randn(16, 2048, generator=seeded()).to(torch.bfloat16).to(DEVICE)
    whole = poison(blocks.splits, 16, 2560)
    multiply(stored, x, whole, blocks)
    assert error(whole.sum(0), x.cpu().double() @ meant.T) < 1e-2
    for rows in (1, 2, 5, 8):
        part = poison(blocks.splits, rows, 2560)
        multiply(stored, x[:rows], part, blocks)
        assert torch.equal(part, whole[:, :rows])


@pytest.mark.slow
def test_kernels_compile_for_an_l40s_and_an_h100_and_stay_in_registers(tmp_path: Path) -> None:
    """The stories: fp8 weights turned into bfloat16 directly compiled for Hopper and for nothing before it. Blocks that an
    H100 has room for asked an L40S for 108 KB where 99 are: no model in bfloat16 or float32 could have started there.
    """
    script = Path(__file__).with_name("gpu_compile.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    packages = os.pathsep.join([str(script.parents[1]), *sys.path])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": packages}
    run = subprocess.run(
        [sys.executable, script, tmp_path, "89", "90"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    needs = found["needs"]
    assert len(needs) == 116
    narrow = {name: need for name, need in needs.items() if "float32" not in name}
    assert not {name: need for name, need in narrow.items() if need["stack"] > 0}
    for target, most in SHARED_BYTES.items():
        assert max(need["shared"] for name, need in needs.items() if name.endswith(f"sm_{target}")) <= most
    assert found["cache_hits"] == [False, True], "a compiled kernel that came with a checkpoint was not found"
