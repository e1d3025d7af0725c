# pyright: basic, reportCallIssue=false
# Kernel bodies are Triton's language in Python's clothes, and launches take options that no signature shows.
"""Kernels that start while the one before them still runs: programmatic dependent launch, compute capability 9.0 and later.

A decode step is a chain of short kernels, and between two of them the memory would rest. So every kernel of the chain lets
its successor start at once, has its own weights fetched, and only then waits for its predecessor's results. All of a
kernel's programs wait, so when a kernel has ended, all before it have: what it overwrites nobody reads. The chain's first
kernel waits before it lets go. So before its wait a kernel may read what no kernel of the chain writes: weights, and which
slots and positions the step has. On older GPUs and on the interpreter none of this is compiled.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OLDEST = (9, 0)


def overlaps(x: Tensor) -> bool:
    """Whether kernels on this tensor's device can start early: their `early`, and the launch option `launch_pdl`."""
    return x.is_cuda and _can_overlap(x.device)


@cache
def _can_overlap(device: torch.device) -> bool:
    return not knobs.runtime.interpret and torch.cuda.get_device_capability(device) >= OLDEST


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether the matrix units take operands from shared memory, 227 KB of it: Hopper's do."""
    return device.type == "cuda" and not knobs.runtime.interpret and torch.cuda.get_device_capability(device) == OLDEST


@triton.jit
def start_next(early: tl.constexpr):
    """Let the next kernel start. It waits for this one to end before it reads what this one writes."""
    if early:
        gdc_launch_dependents()


@triton.jit
def wait(early: tl.constexpr):
    """Wait until all kernels before this one have ended."""
    if early:
        gdc_wait()


@triton.jit
def wait_for_input(early: tl.constexpr):
    """Both."""
    start_next(early)
    wait(early)


@triton.jit
def prefetch(address, size: tl.constexpr):
    """Have `size` bytes from each address on fetched into the L2 cache; returns at once. Multiples of 16, int64 addresses.

    A tensor of one address a thread asks once for each.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [address, tl.full(address.shape, size, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_rows(first, row, rows, row_bytes: tl.constexpr, begin, length: tl.constexpr, block_rows: tl.constexpr,
                  threads: tl.constexpr):  # fmt: skip
    """The same for bytes [begin, begin + length) of the rows `row` to `row` + block_rows, a piece of a row a thread.

    first: pointer to a byte type. begin, length, row_bytes: multiples of 16.
    """
    pieces: tl.constexpr = (threads + block_rows - 1) // block_rows
    piece_bytes: tl.constexpr = (length + 16 * pieces - 1) // (16 * pieces) * 16
    index = tl.arange(0, pieces * block_rows)
    wanted = tl.minimum(row + index // pieces, rows - 1).to(tl.int64)
    at = tl.minimum(index % pieces * piece_bytes, length - piece_bytes)
    prefetch((first + (wanted * row_bytes + begin + at)).to(tl.int64), piece_bytes)
