"""Compile the Triton kernels for GPUs that are not here: `python tests/gpu_compile.py FOLDER CAPABILITY…` prints JSON.

What each kernel needs, and whether one that was carried into an empty cache is found there. Triton's package brings the
whole compiler, ptxas included, so code generation is checked where nothing can run. A process of its own, because kernels
imported under the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma_opt.engine.batch import Level
from gemma_opt.engine.kernels import (
    triton_attention,
    triton_chunk,
    triton_grid,
    triton_int4,
    triton_layer,
    triton_linear,
    triton_rows,
    triton_sampling,
)
from gemma_opt.engine.kernels.triton_compiled import install_compiled, keep_compiled
from gemma_opt.engine.kernels.triton_linear import Blocks, Matrix, blocks_for, fit
from gemma_opt.engine.kernels.triton_tuning import MANY, _candidates_of_many

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {89: 99 * 1024, 90: 227 * 1024}  # that a program may have on an L40S and on an H100
DTYPES = {"int8": "i8", "bfloat16": "bf16", "float32": "fp32", "fp8": "fp8e4nv", "int4": "u8"}
STORED = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.float8_e4m3fn}
CHUNKS = {"vocabulary": 262_208, "stops": 2, "chunk": 64}
SAMPLED = {
    **dict.fromkeys(("slots", "positions", "stops_from", "stop_ids", "best", "picked", "route", "top_k", "seed"), "i64"),
    **dict.fromkeys(("last_tokens", "last_positions", "tokens"), "i64"),
    **dict.fromkeys(("logits", "temperature", "top_p", "min_p"), "fp32"), "seen": "u8",
}  # fmt: skip
PLACED = {
    **dict.fromkeys(("slots", "positions"), "i64"),
    **dict.fromkeys(("partial", "query_norm", "key_norm", "cos", "sin"), "fp32"),
}  # fmt: skip
HEADS = {"heads": 8, "kv_heads": 4, "head_dim": 256}

Compile = Callable[[int], dict[str, int]]


def compiled(
    kernel: object, pointers: dict[str, str], scalars: dict[str, str], constants: dict[str, object], warps: int, stages: int = 4
) -> Compile:
    """A function of the compute capability that compiles a kernel with aligned pointers of these types."""

    def build(capability: int) -> dict[str, int]:
        names = kernel.arg_names
        if "early" in names:
            constants["early"] = capability >= 90
        if "ahead" in names:
            constants["ahead"] = constants.get("threads", 128) * 16 if capability >= 90 else 0
        signature = {name: "constexpr" if name in constants else scalars.get(name, f"*{pointers.get(name)}") for name in names}
        aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in pointers}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        found = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
        )
        return {**usage(found.asm["cubin"]), "shared": found.metadata.shared}

    return build


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (what did not fit the registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing).groups()
    return {"registers": int(registers), "stack": int(stack)}


def large_matrix(kind: str, *, gated: bool, group: int = 0) -> Matrix:
    """[10240, 2560], or twice as high."""
    outputs = 20_480 if gated else 10_240
    weight = torch.empty(outputs, 1280 if group else 2560, dtype=STORED.get(kind, torch.uint8), device="meta")
    return Matrix(weight, 2560, group=group, half=128 if group else 0)


def linear(
    kind: str,
    blocks: Blocks,
    *,
    gated: bool = False,
    group: int = 0,
    rows: int = 8,
    has_x_scale: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Compile:
    """The product of a [10240, 2560] matrix with activations of a dtype, cut up as `multiply` does it on that GPU."""
    matrix = large_matrix(kind, gated=gated, group=group)
    narrow = dtype == torch.bfloat16
    constants = {
        "out_features": 10_240, "in_features": 2560, "gated": gated, "operand": tl.bfloat16 if narrow else tl.float32,
        "splits": blocks.splits, "block_out": blocks.outputs, "threads": 32 * blocks.warps, "has_x_scale": has_x_scale,
        "row_bytes": matrix.row_bytes,
        **({"group": group, "half": 128} if group else {"has_scale": kind in ("int8", "fp8"), "block_in": blocks.inputs}),
    }  # fmt: skip
    activations = "bf16" if narrow else "fp32"
    pointers = {
        "x": activations, "x_scale": "fp32", "weight": DTYPES[kind], "scale": "i32" if group else "fp32",
        "out": activations if gated else "fp32",
    }  # fmt: skip
    kernel = triton_int4.int4_kernel if group else triton_linear._linear_kernel

    def build(capability: int) -> dict[str, int]:
        tile, stages = fit(matrix, blocks, rows, dtype, SHARED_BYTES[capability])
        whole = {**constants, "block_rows": tile}
        return compiled(kernel, pointers, {"rows": "i32"}, whole, blocks.warps, stages)(capability)

    return build


def attention(dtype: torch.dtype, heads: int = 8, kv_heads: int = 4, head_dim: int = 256, *, placed: bool = False) -> Compile:
    """Of a decode step: by default the 4B's."""
    narrow = dtype == torch.bfloat16
    kind, block = ("bf16", triton_attention.BLOCK) if narrow else ("fp32", triton_attention.BLOCK // 2)
    return compiled(
        triton_attention._attend_kernel,
        {**PLACED, "keys": kind, "values": kind, "most": "fp32", "total": "fp32", "mixed": "fp32", "ended": "i32", "out": kind},
        {"rows": "i32", "eps": "fp32", "scale": "fp32", "window": "i32"},
        {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "length": 1024, "placed": placed, "qkv_splits": 10,
         "block_half": head_dim // 2, "block_shared": heads // kv_heads, "splits": triton_attention.SPLITS,
         "operand": tl.bfloat16 if narrow else tl.float32, "block_heads": 16, "block": block,
         "threads": triton_attention.THREADS},
        warps=triton_attention.THREADS // 32, stages=2,
    )  # fmt: skip


def chunk_attention(dtype: torch.dtype, tokens: int) -> Compile:
    """Of a chunk, over the same heads, cut up as on that GPU."""
    narrow = dtype == torch.bfloat16
    kind = "bf16" if narrow else "fp32"
    pointers = {
        **dict.fromkeys(("made", "keys", "values", "out"), kind), **dict.fromkeys(("slot", "positions", "pictures"), "i64"),
        **dict.fromkeys(("most", "total", "mixed"), "fp32"),
    }  # fmt: skip
    constants = {
        "heads": 8, "kv_heads": 4, "head_dim": 256, "operand": tl.bfloat16 if narrow else tl.float32, "block_dim": 256,
        "block": triton_attention.BLOCK if narrow else triton_attention.BLOCK // 2,
    }  # fmt: skip

    def build(capability: int) -> dict[str, int]:
        tile, splits = triton_chunk.cut(2 * tokens, 4, wgmma=narrow and capability == 90)
        whole = {**constants, "block_rows": tile, "splits": splits}
        scalars = {**dict.fromkeys(("tokens", "length", "window"), "i32"), "scale": "fp32"}
        return compiled(triton_chunk._attend_chunk_kernel, pointers, scalars, whole, warps=triton_attention.THREADS // 32)(
            capability
        )

    return build


KERNELS: dict[str, Compile] = {
    "int8": linear("int8", Blocks(splits=4)),
    "int8 in one step": linear("int8", Blocks(outputs=16, inputs=512, splits=5, warps=1)),
    "int8 gated": linear("int8", Blocks(outputs=16, warps=1), gated=True),
    "bfloat16": linear("bfloat16", Blocks()),
    "fp8": linear("fp8", Blocks(splits=2)),
    "int4 of 128": linear("int4", Blocks(splits=4), group=128),
    "int4 of 32, gated": linear("int4", Blocks(), gated=True, group=32),
    "int8 of int8 inputs, gated": linear("int8", Blocks(outputs=16, warps=1), gated=True, has_x_scale=True),
    "int4 of int8 inputs": linear("int4", Blocks(splits=4), group=32, has_x_scale=True),
    **{
        f"settle {limit}": compiled(
            triton_grid._settle_kernel,
            {"partial": "bf16", "input_scale": "fp32", "steps": "bf16", "scales": "fp32"}, {"rows": "i32"},
            {"splits": 1, "width": 10_240, "limit": limit, "is_static": False, "block": 16_384}, warps=8,
        )
        for limit in (0, 127, 448)
    },
    "bfloat16, gated, 16 rows": linear("bfloat16", Blocks(), gated=True, rows=16),
    "float32, gated, 16 rows": linear("float32", Blocks(), gated=True, rows=16, dtype=torch.float32),
    "int4 of float32 inputs, gated, 64 rows": linear("int4", Blocks(), gated=True, group=32, rows=64, dtype=torch.float32),
    "int8, 64 rows": linear("int8", blocks_for(64, Blocks(), torch.bfloat16), rows=64),
    **{
        f"int8, {rows} rows of prefill in {blocks}{', gated' if gated else ''}": linear(
            "int8", blocks, rows=blocks.rows, gated=gated
        )
        for rows in MANY
        for gated in (False, True)
        for blocks in _candidates_of_many(large_matrix("int8", gated=gated), rows, gated=gated)
    },
    "dequantize int4": compiled(
        triton_int4.dequantize_kernel, {"weight": "u8", "scale": "i32", "out": "bf16"}, {"rows": "i32"},
        {"stride": 10_240, "in_features": 2560, "group": 32, "half": 128, "row_bytes": 1280, "operand": tl.bfloat16,
         "block_out": 32}, warps=4,
    ),
    **{
        f"widen {kind}": compiled(
            triton_rows._widen_kernel, {"weight": DTYPES[kind], "out": "bf16"}, {"size": "i32"},
            {"block": triton_rows.WIDENED}, warps=4,
        )
        for kind in ("int8", "fp8")
    },
    "finish with bias and GELU": compiled(
        triton_rows._finish_kernel,
        {"product": "bf16", "scale": "fp32", "x_scale": "fp32", "bias": "bf16", "out": "bf16"},
        dict.fromkeys(("rows", "width", "product_stride", "out_stride"), "i32"),
        {"has_scale": True, "has_x_scale": False, "has_bias": True, "gelu": True, "block_rows": triton_rows.BLOCK_ROWS,
         "block_out": triton_rows.BLOCK_OUT}, warps=4,
    ),
    "attention": attention(torch.bfloat16),
    "attention of the 1B": attention(torch.bfloat16, 4, 1),
    "attention of the 27B, whose keys are stored": attention(torch.bfloat16, 32, 16, 128, placed=True),
    "attention of float32": attention(torch.float32),
    "attention of a chunk of 16": chunk_attention(torch.bfloat16, 16),
    "attention of a chunk of 288": chunk_attention(torch.bfloat16, 288),
    "attention of a chunk of 288 of float32": chunk_attention(torch.float32, 288),
    "join": compiled(
        triton_chunk._join_kernel, {"most": "fp32", "total": "fp32", "mixed": "fp32", "out": "bf16"}, {},
        {"head_dim": 256, "splits": 16, "block_dim": 256}, warps=4,
    ),
    "make heads": compiled(
        triton_layer._make_heads_kernel, {**PLACED, "made": "bf16"}, {"rows": "i32", "eps": "fp32"},
        {**HEADS, "splits": 4, "block": 128}, warps=1,
    ),
    "store heads": compiled(
        triton_layer._store_kernel,
        {**dict.fromkeys(("slots", "positions", "last"), "i64"), **dict.fromkeys(("made", "keys", "values"), "bf16")},
        {"length": "i32"}, {**HEADS, "block": 256}, warps=1,
    ),
    "add and norm": compiled(
        triton_layer._add_norm_kernel,
        {"partial": "fp32", "post_norm": "fp32", "residual": "bf16", "next_norm": "fp32", "normed": "bf16"},
        {"rows": "i32", "eps": "fp32"}, {"splits": 4, "hidden": 2560, "block": 4096}, warps=8,
    ),
    "embed": compiled(
        triton_layer._embed_kernel,
        {"tokens": "i64", "table": "i8", "scale": "fp32", "norm": "fp32", "residual": "bf16", "normed": "bf16"},
        {"eps": "fp32", "embedding_scale": "fp32"}, {"hidden": 2560, "has_scale": True, "block": 4096}, warps=8,
    ),
    **{
        f"maxima of {part}": compiled(
            triton_sampling._maxima_kernel, SAMPLED, {"stride": "i32"},
            {**CHUNKS, "piece": triton_sampling.PIECE, "by_chunk": part == "chunks"}, warps=4,
        )
        for part in ("pieces", "chunks")
    },
    "greedy token": compiled(
        triton_sampling._greedy_kernel, SAMPLED, {}, {"vocabulary": 262_208, "pieces": 129, "block": 256},
        warps=triton_sampling.WARPS[Level.GREEDY],
    ),
    "narrow token": compiled(
        triton_sampling._narrow_kernel, SAMPLED, {"stride": "i32"}, {**CHUNKS, "width": 64, "block": 8192},
        warps=triton_sampling.WARPS[Level.NARROW],
    ),
}  # fmt: skip


def carried(folder: Path, name: str, target: int) -> list[bool]:
    """Compile, collect, empty the cache, install, compile again: whether Triton found the kernel in its cache each time."""
    hits: list[bool] = []

    def compile_in(cache: Path) -> None:
        knobs.cache.dir = str(cache)
        before = knobs.compilation.listener

        def note(**event: object) -> None:
            hits.append(bool(event["cache_hit"]))
            if before:
                before(**event)

        knobs.compilation.listener = note
        KERNELS[name](target)
        knobs.compilation.listener = before

    with keep_compiled(folder / "shipped"):
        compile_in(folder / "first")
    knobs.cache.dir = str(folder / "second")
    install_compiled(folder / "shipped")
    compile_in(folder / "second")
    return hits


if __name__ == "__main__":
    targets = [int(argument) for argument in sys.argv[2:]]
    needs = {f"{name} sm_{target}": build(target) for target in targets for name, build in KERNELS.items()}
    json.dump({"needs": needs, "cache_hits": carried(Path(sys.argv[1]), "embed", targets[0])}, sys.stdout)
