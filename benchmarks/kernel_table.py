"""Every product of a decode step against the time memory needs for its bytes."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from transformers import Gemma3TextConfig

from benchmarks.synthetic import random_linear
from gemma_opt.engine.kernels import build
from gemma_opt.engine.kernels.cpu import multiply
from gemma_opt.engine.packed import FloatRows, PackedLinear

COLD_BYTES = 160 << 20  # copies of a matrix until no cache holds them all
REPEATS = 3


def kernel_table(config: Gemma3TextConfig, threads: int) -> list[dict[str, object]]:
    """One row for each matrix, stored format and number of rows. floor_us: its bytes at the measured read bandwidth."""
    library = build.load_library()
    if library is None:
        return []
    head_dim = config.head_dim
    shapes = {
        "qkv": ((config.num_attention_heads + 2 * config.num_key_value_heads) * head_dim, config.hidden_size),
        "o": (config.hidden_size, config.num_attention_heads * head_dim),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "head": (config.vocab_size, config.hidden_size),
    }
    read = _read_bandwidth()
    table: list[dict[str, object]] = []
    for name, (out, columns) in shapes.items():
        for stored in ("int8",) if name == "head" else ("int8", "int4"):
            one = random_linear(stored, out, columns)
            size = sum(part.nbytes for part in vars(one).values() if isinstance(part, Tensor))
            copies = [one, *(random_linear(stored, out, columns) for _ in range(COLD_BYTES // size))]
            for rows in (1, 8):
                x = torch.randn(rows, columns)
                seconds = _seconds(lambda linear, x=x: multiply(library, linear, x, threads), copies)
                table.append(
                    {"product": name, "format": stored, "rows": rows, "bytes": size, "us": 1e6 * seconds,
                     "gb_s": size / seconds / 1e9, "floor_us": 1e6 * size / read, "share_of_read": size / seconds / read}
                )  # fmt: skip
    return table


def _seconds(run: object, copies: list[PackedLinear]) -> float:
    """Median over repeats of the mean time of one product, its weights never in a cache."""
    assert callable(run)
    means: list[float] = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        for linear in copies:
            run(linear)
        means.append((time.perf_counter() - started) / len(copies))
    return statistics.median(means[1:])


def _read_bandwidth() -> float:
    """Bytes a second that summing floats reads."""
    data = FloatRows(torch.ones(COLD_BYTES // 4)).weight
    times: list[float] = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return data.nbytes / statistics.median(times)
