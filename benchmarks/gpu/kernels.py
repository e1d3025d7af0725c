"""Stage `kernels`: the engine's Triton kernels on the GPU, right first, then their share of the bandwidth."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import DEVICE, Results, copy_gb_s, reset_peak
from benchmarks.synthetic import random_linear, text_config
from gemma_opt.engine.kernels.triton_attention import Scratch, attend
from gemma_opt.engine.kernels.triton_layer import Heads, make_heads, store_heads
from gemma_opt.engine.kernels.triton_linear import FEW_ROWS, Matrix, multiply
from gemma_opt.engine.kernels.triton_matrices import arrange, matrix_of
from gemma_opt.engine.kernels.triton_tuning import Tuning, time_captured
from gemma_opt.engine.packed import Int4Halves, PackedLinear

ROWS = (1, 2, 4, 8, 16)
COLD_BYTES = 256 << 20  # of copies, so that none comes out of the L2 cache
MATRICES = ("qkv", "o", "gate_up", "down", "head")
FORMATS = ("int8", "int4", "bf16")
CHECKED_OUTPUTS = 64  # at either end of a matrix, against float64


def run(results: Results, shape: str) -> None:
    """Every matrix in every format, then attention."""
    if DEVICE.type != "cuda":
        raise SystemExit("this stage needs a GPU; without one the kernels run in tests/test_triton_kernels.py")
    config = text_config(shape)
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    shapes = {
        "qkv": (width, config.hidden_size),
        "o": (config.hidden_size, config.num_attention_heads * config.head_dim),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }
    tuning = Tuning(torch.bfloat16)
    ceiling = copy_gb_s()
    for name in MATRICES:
        for stored in FORMATS:
            if name == "head" and stored == "int4":
                continue  # nobody stores the table so
            gated = name == "gate_up"
            results.measure(f"{name} {stored}", lambda n=name, s=stored, g=gated: product(tuning, s, *shapes[n], g, ceiling))
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for tokens, window in ((512, 1024), (750, None), (3000, 1024), (8191, None)):
        results.measure(
            f"attention at {tokens}, window {window}", lambda t=tokens, w=window: attention(heads, kv_heads, head_dim, t, w)
        )


def product(tuning: Tuning, stored: str, outputs: int, inputs: int, gated: bool, ceiling: float) -> dict[str, object]:
    """Error against float64, whether bits depend on the number of rows, and GB/s by rows with the blocks measured best."""
    reset_peak()
    one = random_linear(stored, outputs, inputs)
    first = on_gpu(one)
    size = first.bytes
    copies = [first, *(on_gpu(one) for _ in range(-(-COLD_BYTES // size)))]
    tuning.measure([(matrix, gated) for matrix in copies])
    blocks = tuning.blocks(copies[0], gated=gated)
    x = torch.randn(FEW_ROWS, inputs, device=DEVICE).to(torch.bfloat16)
    width = outputs // 2 if gated else outputs
    dtype = torch.bfloat16 if gated else torch.float32
    errors: dict[int, float] = {}
    rates: dict[int, float] = {}
    whole: Tensor | None = None
    same = True
    for rows in reversed(ROWS):
        out = torch.full((blocks.splits, rows, width), float("nan"), dtype=dtype, device=DEVICE)
        multiply(copies[0], x[:rows], out, blocks, gated=gated)
        whole = out.clone() if whole is None else whole
        same &= torch.equal(out, whole[:, :rows])
        errors[rows] = relative_error(out.sum(0), copies[0], x[:rows], gated=gated)
        seconds = time_captured(lambda o=out, r=rows: [multiply(matrix, x[:r], o, blocks, gated=gated) for matrix in copies])
        rates[rows] = size * len(copies) / seconds / 1e9
    if not same or not max(errors.values()) < 2e-2:
        raise RuntimeError(f"{stored} [{outputs}, {inputs}]: errors {errors}, same bits {same}")
    return {
        "blocks": vars(blocks), "bytes": size, "relative_error": errors, "bits_independent_of_rows": same, "gb_s": rates,
        "share_of_copy": {rows: rate / ceiling for rows, rate in rates.items()}, "copy_gb_s": ceiling,
    }  # fmt: skip


def on_gpu(packed: PackedLinear) -> Matrix:
    """A copy on the device, as the kernels read it."""
    parts = {name: part.to(DEVICE, copy=True) if isinstance(part, Tensor) else part for name, part in vars(packed).items()}
    matrix = matrix_of(arrange(replace(packed, **parts)))
    if matrix is None:
        raise TypeError(f"no kernel for a {type(packed).__name__}")
    return matrix


def relative_error(found: Tensor, matrix: Matrix, x: Tensor, *, gated: bool) -> float:
    """‖found − meant‖ / ‖meant‖, meant in float64; NaN if anything was left unwritten."""
    if not torch.isfinite(found).all():
        return float("nan")
    width = found.shape[1]
    some = torch.cat((torch.arange(CHECKED_OUTPUTS), torch.arange(width - CHECKED_OUTPUTS, width))).to(DEVICE)

    def exact(rows: Tensor) -> Tensor:
        if matrix.scale is None:
            return x.double() @ matrix.weight[rows].double().T
        if matrix.group:
            halves = Int4Halves(
                matrix.weight[rows], matrix.scale[:, rows].contiguous(), matrix.group, matrix.half, matrix.in_features
            )
            return x.double() @ halves.dequantize().double().T
        return (x.double() @ matrix.weight[rows].double().T) * matrix.scale[rows].double()

    meant = exact(some)
    if gated:
        meant = functional.gelu(meant, approximate="tanh") * exact(some + width)
    return float((found[:, some].double() - meant).norm() / meant.norm())


def attention(heads: int, kv_heads: int, head_dim: int, tokens: int, window: int | None) -> dict[str, object]:
    """16 slots, the last at position `tokens` − 1: error against float64, and whether a row's bits depend on the others."""
    length = min(tokens, window) if window else tokens
    keys, values = (torch.randn(FEW_ROWS, kv_heads, length, head_dim, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    partial = torch.randn(4, FEW_ROWS, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    norms = torch.rand(2, head_dim, device=DEVICE) + 0.5
    angles = torch.rand(tokens, head_dim // 2, device=DEVICE) * 6
    slots = torch.arange(FEW_ROWS, device=DEVICE)
    positions = torch.linspace(0, tokens - 1, FEW_ROWS, device=DEVICE).long()
    made = torch.empty(FEW_ROWS, heads + 2 * kv_heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    placed_keys, placed_values = keys.clone(), values.clone()

    def given(rows: int) -> Heads:
        part = partial[:, :rows].contiguous()
        return Heads(part, slots[:rows], positions[:rows], norms[0], norms[1], angles.cos(), angles.sin(), 1e-6)

    whole = given(FEW_ROWS)
    make_heads(whole, made, kv_heads=kv_heads)
    store_heads(made, slots, positions, placed_keys, placed_values)
    query = made[:, :heads]
    scratch = Scratch.empty(FEW_ROWS, heads, kv_heads, head_dim, DEVICE)
    out = torch.full((FEW_ROWS, heads * head_dim), float("nan"), dtype=torch.bfloat16, device=DEVICE)

    def launch(some: Heads) -> None:
        rows = len(some.slots)
        attend(some, keys, values, out[:rows], scratch, scale=head_dim**-0.5, window=window, placed=False)

    launch(whole)
    off = (keys.double() - placed_keys.double()).abs() / placed_keys.double().abs().clamp(min=1e-3)
    stored = float(off.max()) < 2**-7 and torch.equal(values, placed_values)  # norms are summed in another order there
    meant = torch.stack([one_row(query[row], keys[row], values[row], int(positions[row]), window) for row in range(FEW_ROWS)])
    error = float((out.double().view_as(meant) - meant).norm() / meant.norm())
    together = out.clone()
    out.fill_(float("nan"))
    launch(given(3))
    same = torch.equal(out[:3], together[:3])
    if not stored or not same or not error < 2e-2:
        raise RuntimeError(f"attention at {tokens}: error {error}, same bits {same}, stored right {stored}")
    return {
        "relative_error": error,
        "bits_independent_of_rows": same,
        "seconds_16_rows": time_captured(lambda: launch(whole)),
    }


def one_row(query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None) -> Tensor:
    """[heads, head_dim] in float64."""
    begin = 0 if window is None else max(0, position - window + 1)
    places = torch.arange(begin, position + 1, device=DEVICE) % keys.shape[1]
    return functional.scaled_dot_product_attention(
        query[:, None].double(), keys[:, places].double(), values[:, places].double(), enable_gqa=True
    )[:, 0]
