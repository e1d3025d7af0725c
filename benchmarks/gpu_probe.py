# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Which kernels to build a decode step on, asked of the GPU at hand: `python benchmarks/gpu_probe.py`, under 8 minutes.

One file that needs torch and Triton alone, so that it runs on any machine before anything else does. It measures
1. the copy bandwidth, the ceiling of everything below;
2. candidate matrix–vector products (int8, int4, bfloat16) at the shapes of Gemma 3 4B, rows 1 to 16, against their bytes;
   each is checked against float64 first, and for whether a row's bits change with the number of rows;
3. a bare decode step of the whole 4B shape on random weights, one CUDA graph, at 512 positions of context;
4. the same layers through torch.compile, int8 weight-only, captured the same way.
Weights and activations are random and not zero, timings are medians of graph replays, and matrices are rotated so that none
comes out of the L2 cache. Results go into a JSON file after every step. `--dry-run` runs all but 4 at tiny shapes on
Triton's CPU interpreter, without timings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton
import triton.language as tl

ROWS = (1, 2, 4, 8, 16)
LAYERS = 34
CONTEXT = 512
POOL_BYTES = 2**30  # of random weights: 20 times the L2 cache of an H200
BUDGET_S = 450.0
REPLAYS = 7


@dataclass(frozen=True)
class Model:
    """What a bare step needs to know of Gemma 3 4B, or of something tiny."""

    hidden: int = 2560
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 256
    intermediate: int = 10_240
    vocabulary: int = 262_208

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each matrix."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocabulary, self.hidden),
        }


@dataclass(frozen=True)
class Config:
    """Tile of a program, programs along the inputs, warps, pipeline depth."""

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int


CONFIGS = (
    Config(16, 256, 1, 2, 4), Config(32, 256, 1, 4, 4), Config(64, 128, 1, 4, 5), Config(64, 128, 4, 4, 4),
    Config(64, 256, 2, 4, 3), Config(128, 128, 2, 4, 4),
)  # fmt: skip
DRY_CONFIGS = (Config(32, 128, 2, 1, 1),)
VECTOR_CONFIGS = (Config(4, 1024, 1, 4, 3), Config(8, 512, 1, 4, 4), Config(16, 256, 2, 4, 4))


# ---- candidate products: out [splits, rows, outputs] float32 ----


@triton.jit
def _load_weights(weight, scale, o, first, outputs, inputs: tl.constexpr, kind: tl.constexpr, group: tl.constexpr,
                  operand: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr):  # fmt: skip
    """A tile [outputs, inputs]; int4 scaled, the others not. All of `inputs` are there: blocks divide them."""
    row = o[:, None].to(tl.int64)
    if kind == "int4":
        groups: tl.constexpr = block_in // group
        byte = first // 2 + tl.arange(0, block_in // 2)
        packed = tl.load(weight + row * (inputs // 2) + byte[None, :], mask=o[:, None] < outputs, other=0)
        g = first // group + tl.arange(0, groups)
        s = tl.load(scale + row * (inputs // group) + g[None, :], mask=o[:, None] < outputs, other=0.0).to(operand)
        s = tl.reshape(tl.broadcast_to(s[:, :, None], (block_out, groups, group // 2)), (block_out, block_in // 2))
        eight = tl.full((block_out, block_in // 2), 8, tl.int8)
        low = ((packed & 15).to(tl.int8) - eight).to(operand) * s
        high = ((packed >> 4).to(tl.int8) - eight).to(operand) * s
        w = tl.interleave(low, high)
    else:
        k = first + tl.arange(0, block_in)
        w = tl.load(weight + row * inputs + k[None, :], mask=o[:, None] < outputs, other=0.0).to(operand)
    return w


@triton.jit(do_not_specialize=["rows", "outputs"])
def weights_first(x, weight, scale, out, rows, outputs, inputs: tl.constexpr, kind: tl.constexpr, group: tl.constexpr,
                  operand: tl.constexpr, splits: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr):  # fmt: skip
    """W · xᵀ on the matrix units, 16 rows of x: weights are the first operand and go there from registers."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    split = tl.program_id(1)
    r = tl.arange(0, 16)
    acc = tl.zeros((block_out, 16), tl.float32)
    for step in range(inputs // (block_in * splits)):
        first = split * (inputs // splits) + step * block_in
        k = first + tl.arange(0, block_in)
        w = _load_weights(weight, scale, o, first, outputs, inputs, kind, group, operand, block_out, block_in)
        values = tl.load(x + r[None, :] * inputs + k[:, None], mask=r[None, :] < rows, other=0.0).to(operand)
        acc = tl.dot(w, values, acc, input_precision="ieee")
    if kind == "int8":
        acc = acc * tl.load(scale + o, mask=o < outputs, other=0.0)[:, None]
    at = (split * rows + r)[None, :] * outputs + o[:, None]
    tl.store(out + at, acc, mask=(r[None, :] < rows) & (o[:, None] < outputs))


@triton.jit(do_not_specialize=["rows", "outputs"])
def activations_first(x, weight, scale, out, rows, outputs, inputs: tl.constexpr, kind: tl.constexpr,
                      group: tl.constexpr, operand: tl.constexpr, splits: tl.constexpr, block_out: tl.constexpr,
                      block_in: tl.constexpr):  # fmt: skip
    """x · Wᵀ on the matrix units: the converted weights pass through shared memory."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    split = tl.program_id(1)
    r = tl.arange(0, 16)
    acc = tl.zeros((16, block_out), tl.float32)
    for step in range(inputs // (block_in * splits)):
        first = split * (inputs // splits) + step * block_in
        k = first + tl.arange(0, block_in)
        w = _load_weights(weight, scale, o, first, outputs, inputs, kind, group, operand, block_out, block_in)
        values = tl.load(x + r[:, None] * inputs + k[None, :], mask=r[:, None] < rows, other=0.0).to(operand)
        acc = tl.dot(values, tl.trans(w), acc, input_precision="ieee")
    if kind == "int8":
        acc = acc * tl.load(scale + o, mask=o < outputs, other=0.0)[None, :]
    at = (split * rows + r)[:, None] * outputs + o[None, :]
    tl.store(out + at, acc, mask=(r[:, None] < rows) & (o[None, :] < outputs))


@triton.jit(do_not_specialize=["rows", "outputs"])
def vector(x, weight, scale, out, rows, outputs, inputs: tl.constexpr, kind: tl.constexpr, group: tl.constexpr,
           operand: tl.constexpr, splits: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr):  # fmt: skip
    """One row without matrix units: how much the 16-row tile costs where only one row is there."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    split = tl.program_id(1)
    acc = tl.zeros((block_out, block_in), tl.float32)
    for step in range(inputs // (block_in * splits)):
        first = split * (inputs // splits) + step * block_in
        k = first + tl.arange(0, block_in)
        w = _load_weights(weight, scale, o, first, outputs, inputs, kind, group, tl.float32, block_out, block_in)
        acc += w * tl.load(x + k).to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if kind == "int8":
        y = y * tl.load(scale + o, mask=o < outputs, other=0.0)
    tl.store(out + split * outputs + o, y, mask=o < outputs)


CANDIDATES = {"weights_first": weights_first, "activations_first": activations_first, "vector": vector}


# ---- the rest of a bare step ----


@triton.jit
def _add_norm(partial, rows, norm, residual, normed, splits: tl.constexpr, hidden: tl.constexpr, block: tl.constexpr):
    """residual += norm(sum of partial); normed = norm(residual). Gemma has a norm on either side of the sum."""
    row = tl.program_id(0)
    d = tl.arange(0, block)
    inside = d < hidden
    total = tl.zeros((block,), tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + (split * rows + row) * hidden + d, mask=inside, other=0.0)
    factor = tl.load(norm + d, mask=inside, other=0.0)
    total = total * tl.rsqrt(tl.sum(total * total, 0) / hidden + 1e-6) * factor
    x = tl.load(residual + row * hidden + d, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(residual + row * hidden + d, x.to(residual.dtype.element_ty), mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / hidden + 1e-6) * factor
    tl.store(normed + row * hidden + d, x.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(partial, rows, out, splits: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0)
    d = tl.program_id(1) * block + tl.arange(0, block)
    gate = tl.zeros((block,), tl.float32)
    up = tl.zeros((block,), tl.float32)
    for split in tl.static_range(splits):
        at = partial + (split * rows + row) * 2 * width + d
        gate += tl.load(at, mask=d < width, other=0.0)
        up += tl.load(at + width, mask=d < width, other=0.0)
    y = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    tl.store(out + row * width + d, y.to(out.dtype.element_ty), mask=d < width)


@triton.jit
def _place(partial, rows, query, keys, values, position, splits: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr,
           head_dim: tl.constexpr, context: tl.constexpr):  # fmt: skip
    """Queries to their place, keys and values to theirs in the cache; a norm and a rotation cost nothing beside it."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, head_dim)
    total = tl.zeros((head_dim,), tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + ((split * rows + row) * (heads + 2 * kv_heads) + head) * head_dim + d)
    y = (total * tl.rsqrt(tl.sum(total * total, 0) / head_dim + 1e-6)).to(query.dtype.element_ty)
    every = d < head_dim
    tl.store(query + (row * heads + head) * head_dim + d, y, mask=every & (head < heads))
    at = (row * kv_heads * context + position) * head_dim + d
    tl.store(keys + at + (head - heads) * context * head_dim, y, mask=every & (head >= heads) & (head < heads + kv_heads))
    tl.store(values + at + (head - heads - kv_heads) * context * head_dim, y, mask=every & (head >= heads + kv_heads))


@triton.jit
def _attend(query, keys, values, most, total, mixed, count, heads: tl.constexpr, kv_heads: tl.constexpr,
            head_dim: tl.constexpr, context: tl.constexpr, splits: tl.constexpr, operand: tl.constexpr,
            block: tl.constexpr):  # fmt: skip
    """One run of positions for the query heads of one KV head; positions 0 to count − 1."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = heads // kv_heads
    h, d = tl.arange(0, 16), tl.arange(0, head_dim)
    q_place = (row * heads + kv_head * shared + h)[:, None] * head_dim + d[None, :]
    q = tl.load(query + q_place, mask=h[:, None] < shared, other=0.0).to(operand)
    run = (tl.cdiv(count, block) + splits - 1) // splits * block
    first = split * run
    last = tl.minimum(first + run, count)
    top = tl.full((16,), float("-inf"), tl.float32)
    weight = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, head_dim), tl.float32)
    while first < last:
        p = first + tl.arange(0, block)
        place = ((row * kv_heads + kv_head) * context + p)[:, None] * head_dim + d[None, :]
        k = tl.load(keys + place, mask=p[:, None] < last, other=0.0).to(operand)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * 0.0625
        scores = tl.where(p[None, :] < last, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp(scores - new_top[:, None])
        fade = tl.exp(top - new_top)
        v = tl.load(values + place, mask=p[:, None] < last, other=0.0).to(operand)
        acc = acc * fade[:, None] + tl.dot(shares.to(operand), v, input_precision="ieee")
        weight = weight * fade + tl.sum(shares, 1)
        top = new_top
        first += block
    at = (row * heads + kv_head * shared + h) * splits + split
    tl.store(most + at, top, mask=h < shared)
    tl.store(total + at, weight, mask=h < shared)
    tl.store(mixed + at[:, None] * head_dim + d[None, :], acc, mask=h[:, None] < shared)


@triton.jit
def _join(most, total, mixed, out, head_dim: tl.constexpr, splits: tl.constexpr):
    at = tl.program_id(0)
    d, s = tl.arange(0, head_dim), tl.arange(0, splits)
    top = tl.load(most + at * splits + s)
    factor = tl.exp(top - tl.max(top, 0))
    parts = tl.load(mixed + (at * splits + s)[:, None] * head_dim + d[None, :])
    y = tl.sum(factor[:, None] * parts, 0) / tl.sum(factor * tl.load(total + at * splits + s), 0)
    tl.store(out + at * head_dim + d, y.to(out.dtype.element_ty))


# ---- weights, launches, timing ----


class Bench:
    """Device, dtypes and the pool of random weights that every matrix is a piece of."""

    def __init__(self, *, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16  # the interpreter knows no bfloat16 arithmetic
        self.operand = tl.float32 if dry else tl.bfloat16
        self.model = Model(256, 4, 2, 64, 256, 300) if dry else Model()
        self.layers = 1 if dry else LAYERS
        self.context = 64 if dry else CONTEXT
        torch.manual_seed(0)
        size = 2**22 if dry else POOL_BYTES
        self._bytes = torch.randint(-128, 128, (size,), dtype=torch.int8, device=self.device)
        self._floats = torch.randn(size // 2, device=self.device).to(self.dtype)

    def matrices(self, kind: str, group: int, outputs: int, inputs: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`count` weights and scales, as many of them different pieces of the pool as fit."""
        pool, width = (self._floats, inputs) if kind == "bf16" else (self._bytes, inputs // 2 if kind == "int4" else inputs)
        size = outputs * width
        pieces = min(count, max(1, pool.numel() // size))
        if pool.numel() < size:
            raise ValueError(f"a matrix of {size:,} elements does not fit the pool of {pool.numel():,}")
        if kind == "int4":
            scales = torch.rand(pieces, outputs, inputs // group, device=self.device).to(torch.bfloat16) + 0.5
        else:
            scales = torch.rand(pieces, outputs, device=self.device) + 0.5
        found = []
        for index in range(count):
            piece = index % pieces
            weight = pool[piece * size : (piece + 1) * size].view(outputs, width)
            found.append((weight.view(torch.uint8) if kind == "int4" else weight, scales[piece]))
        return found

    def seconds(self, launch) -> float:
        """Median of graph replays of what `launch` puts on the device. In a dry run: launch once, 0."""
        launch()
        if self.dry:
            return 0.0
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[REPLAYS // 2]


def multiply(bench: Bench, kernel, kind: str, group: int, x, weight, scale, out, config: Config) -> None:
    """out [splits, rows, outputs] = x · Wᵀ in parts."""
    splits, rows, outputs = out.shape
    kernel[(triton.cdiv(outputs, config.outputs), splits)](
        x, weight, scale, out, rows, outputs, inputs=x.shape[1], kind=kind, group=group, operand=bench.operand, splits=splits,
        block_out=config.outputs, block_in=config.inputs, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def dequantize(kind: str, group: int, weight, scale):
    """float64 [outputs, inputs]."""
    if kind == "bf16":
        return weight.double()
    if kind == "int8":
        return weight.double() * scale[:, None].double()
    nibbles = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(1).double() - 8
    return nibbles * scale.double().repeat_interleave(group, 1)


def bytes_of(weight, scale, kind: str) -> int:
    return weight.nbytes + (0 if kind == "bf16" else scale.nbytes)


# ---- the four measurements ----


def copy_bandwidth(bench: Bench) -> dict[str, object]:
    """GB/s of a device-to-device copy, bytes read plus bytes written."""
    source = bench._bytes
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: [target.copy_(source) for _ in range(4)])
    return {"gb_s": 8 * source.nbytes / seconds / 1e9 if seconds else None}


def products(bench: Bench, deadline: float) -> list[dict[str, object]]:
    """Every candidate at every shape: the best configuration at one row, then the other rows with it."""
    found = []
    formats = [("int8", 0), ("int4", 128), ("int4", 32), ("bf16", 0)]
    for name, (outputs, inputs) in bench.model.shapes.items():
        if bench.dry and name not in ("qkv", "down"):
            continue
        for kind, group in formats:
            if kind == "bf16" and name == "head":
                continue  # larger than the pool; the int8 table is the head
            if kind == "int4" and name == "head":
                continue  # nobody stores the table so
            for candidate in CANDIDATES:
                if time.monotonic() > deadline:
                    print("out of time: candidates left out", file=sys.stderr)
                    return found
                entry = measure_product(bench, candidate, kind, group, outputs, inputs)
                if entry:
                    found.append({"matrix": name, **entry})
                    print(json.dumps({"matrix": name, **entry}), file=sys.stderr, flush=True)
        if not bench.dry:
            found.append({"matrix": name, **cublas(bench, outputs, inputs)})
    return found


def measure_product(bench: Bench, candidate: str, kind: str, group: int, outputs: int, inputs: int) -> dict[str, object] | None:
    """None if no configuration divides the inputs."""
    kernel = CANDIDATES[candidate]
    count = 1 if bench.dry else max(1, min(24, POOL_BYTES // (outputs * inputs)))
    matrices = bench.matrices(kind, group, outputs, inputs, count)
    x = torch.randn(16, inputs, device=bench.device).to(bench.dtype)
    best, timings = None, {}
    configs = DRY_CONFIGS if bench.dry else VECTOR_CONFIGS if candidate == "vector" else CONFIGS
    for config in configs:
        if inputs % (config.inputs * config.splits) or config.inputs < group:
            continue
        out = torch.empty(config.splits, 1, outputs, device=bench.device)
        try:
            multiply(bench, kernel, kind, group, x[:1], *matrices[0], out, config)
            seconds = bench.seconds(
                lambda out=out, config=config: [multiply(bench, kernel, kind, group, x[:1], *m, out, config) for m in matrices]
            )
        except triton.runtime.errors.OutOfResources:
            continue
        timings[str(asdict(config))] = seconds / count
        if best is None or seconds < best[1]:
            best = (config, seconds)
    if best is None:
        return None
    config, floor = best[0], bytes_of(*matrices[0], kind)
    rows_s = {}
    first_row, worst = None, 0.0
    same_bits = True
    for rows in (1,) if candidate == "vector" else (1, 3) if bench.dry else ROWS:
        out = torch.full((config.splits, rows, outputs), float("nan"), device=bench.device)
        multiply(bench, kernel, kind, group, x[:rows], *matrices[0], out, config)
        y = out.sum(0)
        first_row = y[0].clone() if first_row is None else first_row
        same_bits &= bool(torch.equal(y[0], first_row))
        worst = max(worst, relative_error(y, x[:rows], *matrices[0], kind, group))
        rows_s[rows] = bench.seconds(
            lambda out=out, rows=rows: [multiply(bench, kernel, kind, group, x[:rows], *m, out, config) for m in matrices]
        ) / count  # fmt: skip
    return {
        "candidate": candidate, "format": kind + (f"-g{group}" if group else ""), "config": asdict(config), "bytes": floor,
        "seconds_by_rows": rows_s, "gb_s_by_rows": {rows: floor / s / 1e9 for rows, s in rows_s.items() if s},
        "relative_error": worst, "row_bits_independent_of_rows": same_bits, "seconds_by_config": timings,
    }  # fmt: skip


def relative_error(y, x, weight, scale, kind: str, group: int) -> float:
    """Against float64, at the first and last 64 outputs. NaN where something was left unwritten."""
    some = torch.cat((torch.arange(64), torch.arange(weight.shape[0] - 64, weight.shape[0]))).to(y.device)
    meant = x.double() @ dequantize(kind, group, weight[some], scale[some]).T
    error = float((y[:, some].double() - meant).norm() / meant.norm())
    return error if bool(torch.isfinite(y).all()) else float("nan")


def cublas(bench: Bench, outputs: int, inputs: int) -> dict[str, object]:
    """torch's own bfloat16 product of the same shape, as far as the pool holds it."""
    if outputs * inputs > bench._floats.numel():
        return {"candidate": "cublas", "format": "bf16", "left_out": "larger than the pool"}
    count = max(1, min(24, bench._floats.numel() // (outputs * inputs)))
    weights = [weight for weight, _ in bench.matrices("bf16", 0, outputs, inputs, count)]
    rows_s = {}
    for rows in ROWS:
        x = torch.randn(rows, inputs, device=bench.device).to(bench.dtype)
        rows_s[rows] = bench.seconds(lambda x=x: [x @ weight.T for weight in weights]) / count
    size = outputs * inputs * 2
    return {
        "candidate": "cublas", "format": "bf16", "bytes": size, "seconds_by_rows": rows_s,
        "gb_s_by_rows": {rows: size / s / 1e9 for rows, s in rows_s.items()},
    }  # fmt: skip


def bare_step(bench: Bench, kind: str, group: int, configs: dict[str, Config], rows: int) -> dict[str, object]:
    """One token for each of `rows` slots through all layers and the int8 head: nine or ten launches a layer, one graph."""
    model, device, dtype = bench.model, bench.device, bench.dtype
    shapes = model.shapes
    layers = {name: bench.matrices(kind, group, *shapes[name], bench.layers) for name in ("qkv", "o", "gate_up", "down")}
    head = bench.matrices("int8", 0, *shapes["head"], 1)[0]
    caches = [
        [torch.randn(rows, model.kv_heads, bench.context, model.head_dim, device=device).to(dtype) for _ in range(2)]
        for _ in range(bench.layers)
    ]
    outs = {name: torch.empty(configs[name].splits, rows, shapes[name][0], device=device) for name in shapes}
    normed, residual = (torch.randn(rows, model.hidden, device=device).to(dtype) for _ in range(2))
    norm = torch.rand(model.hidden, device=device) + 0.5
    query = torch.empty(rows, model.heads, model.head_dim, device=device, dtype=dtype)
    attended = torch.empty(rows, model.heads * model.head_dim, device=device, dtype=dtype)
    gated = torch.empty(rows, model.intermediate, device=device, dtype=dtype)
    splits = 16
    most, total = (torch.empty(rows, model.heads, splits, device=device) for _ in range(2))
    mixed = torch.empty(rows, model.heads, splits, model.head_dim, device=device)
    hidden_block = triton.next_power_of_2(model.hidden)

    def product(name: str, x, matrix, kind=kind, group=group):
        multiply(bench, weights_first, kind, group, x, *matrix, outs[name], configs[name])
        return outs[name]

    def add_norm(partial) -> None:
        _add_norm[(rows,)](partial, rows, norm, residual, normed, splits=partial.shape[0], hidden=model.hidden,
                           block=hidden_block, num_warps=8)  # fmt: skip

    def step() -> None:
        for layer in range(bench.layers):
            keys, values = caches[layer]
            qkv = product("qkv", normed, layers["qkv"][layer])
            _place[(rows, model.heads + 2 * model.kv_heads)](
                qkv, rows, query, keys, values, bench.context - 1, splits=qkv.shape[0], heads=model.heads,
                kv_heads=model.kv_heads, head_dim=model.head_dim, context=bench.context, num_warps=1,
            )  # fmt: skip
            _attend[(rows, model.kv_heads, splits)](
                query, keys, values, most, total, mixed, bench.context, heads=model.heads, kv_heads=model.kv_heads,
                head_dim=model.head_dim, context=bench.context, splits=splits, operand=bench.operand, block=32, num_warps=4,
            )  # fmt: skip
            _join[(rows * model.heads,)](most, total, mixed, attended, head_dim=model.head_dim, splits=splits, num_warps=4)
            add_norm(product("o", attended, layers["o"][layer]))
            gate_up = product("gate_up", normed, layers["gate_up"][layer])
            _gelu[(rows, triton.cdiv(model.intermediate, 1024))](
                gate_up, rows, gated, splits=gate_up.shape[0], width=model.intermediate, block=1024, num_warps=4
            )
            add_norm(product("down", gated, layers["down"][layer]))
        product("head", normed, head, "int8", 0)

    seconds = bench.seconds(step)
    weight_bytes = sum(bytes_of(*matrix, kind) for group_ in layers.values() for matrix in group_) + bytes_of(*head, "int8")
    kv_bytes = sum(part.nbytes for cache in caches for part in cache)
    if not bool(torch.isfinite(outs["head"]).all()):
        raise RuntimeError(f"the bare {kind} step made values that are not finite")
    size = weight_bytes + kv_bytes
    return {
        "format": kind + (f"-g{group}" if group else ""), "rows": rows, "seconds": seconds, "bytes": size,
        "tokens_per_s": rows / seconds if seconds else None, "gb_s": size / seconds / 1e9 if seconds else None,
    }  # fmt: skip


def best_configs(bench: Bench, entries: list[dict[str, object]], kind: str, group: int) -> dict[str, Config]:
    """The configurations measured for `weights_first`; the head's are those of int8. A dividing default where none was."""
    label = kind + (f"-g{group}" if group else "")
    configs = {}
    for name, (_, inputs) in bench.model.shapes.items():
        wanted = "int8" if name == "head" else label
        same = [e for e in entries if (e["matrix"], e["candidate"], e.get("format")) == (name, "weights_first", wanted)]
        default = next(c for c in CONFIGS if inputs % (c.inputs * c.splits) == 0 and c.inputs >= group)
        configs[name] = Config(**same[0]["config"]) if same else default  # type: ignore[arg-type]
    return configs


def compiled_layers(bench: Bench, rows: int) -> dict[str, object]:
    """The matrices of all layers as torch.compile makes them of `x @ w.to(bf16).T * scale`: no attention, no KV cache."""
    import torch._inductor.config as inductor

    inductor.coordinate_descent_tuning = True  # what makes the weight-only product a fused one at one row
    shapes = bench.model.shapes
    layers = {name: bench.matrices("int8", 0, *shapes[name], bench.layers) for name in ("qkv", "o", "gate_up", "down")}
    norm = torch.rand(bench.model.hidden, device=bench.device).to(bench.dtype)

    def rms(x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * norm

    def linear(x, weight, scale):
        return (torch.nn.functional.linear(x, weight.to(x.dtype)) * scale).to(x.dtype)

    @torch.compile(fullgraph=True, dynamic=False)
    def layer(x, qkv, o, gate_up, down):
        mixed = linear(rms(x), *qkv)[:, : o[0].shape[1]]
        x = x + rms(linear(mixed, *o))
        gate, up = linear(rms(x), *gate_up).chunk(2, dim=-1)
        return x + rms(linear(torch.nn.functional.gelu(gate, approximate="tanh") * up, *down))

    x = torch.randn(rows, bench.model.hidden, device=bench.device).to(bench.dtype)
    started = time.monotonic()

    def step() -> None:
        y = x
        for index in range(bench.layers):
            y = layer(y, *(layers[name][index] for name in ("qkv", "o", "gate_up", "down")))

    step()
    compile_s = time.monotonic() - started
    seconds = bench.seconds(step)
    size = sum(bytes_of(*matrix, "int8") for group in layers.values() for matrix in group)
    return {"rows": rows, "seconds": seconds, "bytes": size, "gb_s": size / seconds / 1e9, "compile_s": compile_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU interpreter: does it run at all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_probe.json")
    arguments = parser.parse_args()
    started = time.monotonic()
    bench = Bench(dry=arguments.dry_run)
    result: dict[str, object] = {
        "what": "candidates for the decode step of Gemma 3 4B, random weights",
        "device": "interpreter" if bench.dry else torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "model": asdict(bench.model),
    }  # fmt: skip

    def keep(name: str, value: object) -> None:
        result[name] = value
        result["seconds"] = round(time.monotonic() - started, 1)
        if not bench.dry:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    keep("copy", copy_bandwidth(bench))
    entries = products(bench, started + 0.6 * BUDGET_S)
    keep("products", entries)
    steps = []
    for kind, group in (("int8", 0), ("int4", 128), ("int4", 32), ("bf16", 0)):
        configs = best_configs(bench, entries, kind, group)
        for rows in (2,) if bench.dry else ROWS:
            steps.append(bare_step(bench, kind, group, configs, rows))
            print(json.dumps(steps[-1]), file=sys.stderr, flush=True)
    keep("bare_steps", steps)
    if not bench.dry and time.monotonic() - started < BUDGET_S - 90:
        keep("compiled_layers", [compiled_layers(bench, rows) for rows in (1, 8)])
    print_summary(result)


def print_summary(result: dict[str, object]) -> None:
    """The table that a caller who sees only the end of the output needs."""
    ceiling = result["copy"]["gb_s"]  # type: ignore[index]
    print(f"{result['device']}: copy {ceiling or 0:,.0f} GB/s, {result['seconds']} s")
    for entry in result["products"]:  # type: ignore[union-attr]
        rates = entry.get("gb_s_by_rows", {})
        shares = " ".join(f"{rows}:{rate:5.0f}" for rows, rate in rates.items())
        error = ""
        if "relative_error" in entry:
            error = f"error {entry['relative_error']:.1e} same bits {entry['row_bits_independent_of_rows']}"
        print(f"{entry['matrix']:8} {entry.get('format', ''):9} {entry['candidate']:17} GB/s {shares} {error}")
    for entry in result["bare_steps"]:  # type: ignore[union-attr]
        rates = f"{entry['tokens_per_s'] or 0:8.1f} tok/s {entry['gb_s'] or 0:6.0f} GB/s"
        print(f"step {entry['format']:9} rows {entry['rows']:2} {rates}")
    for entry in result.get("compiled_layers", []):  # type: ignore[union-attr]
        print(f"torch.compile int8 layers, rows {entry['rows']}: {entry['gb_s']:.0f} GB/s")


if __name__ == "__main__":
    main()
