"""Which blocks each matrix is cut into: measured once on the GPU at hand, kept in a file beside the compile cache.

A decode step's choice knows the matrix and never the number of rows, or results would change with the batch. A file serves
exactly the torch, Triton and GPU it was made with. Without one, and without a measurement, a rule gives sound blocks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from gemma_opt.engine.kernels.triton_library import PIECE_BYTES, multiply_by_library
from gemma_opt.engine.kernels.triton_linear import FEW_ROWS, Blocks, Matrix, multiply
from gemma_opt.engine.linear import gated_gelu

log = logging.getLogger(__name__)

MOST_SPLITS = 10
CANDIDATES = tuple(
    Blocks(outputs, inputs, splits, warps, stages)
    for outputs, inputs, warps, stages in (
        (16, 128, 1, 6), (16, 256, 1, 3), (16, 256, 1, 4), (16, 512, 1, 3), (32, 256, 1, 4), (32, 128, 2, 5), (32, 256, 2, 3),
        (32, 256, 2, 4), (32, 512, 2, 3), (64, 256, 2, 3),
    )
    for splits in range(1, MOST_SPLITS + 1)
)  # fmt: skip
ONE_STEP = tuple((outputs, inputs, warps) for outputs, warps in ((16, 1), (32, 2)) for inputs in (256, 512, 1024))
"""Outputs, inputs and warps of blocks that need one step, their splits following from the matrix: see `_linear_kernel`."""
MANY = {
    rows: tuple(Blocks(outputs, inputs, 1, warps, stages, tile) for outputs, inputs, warps, stages, tile in tiles)
    for rows, tiles in (
        (64, ((32, 256, 2, 3, 64), (64, 128, 4, 4, 64), (64, 128, 8, 4, 64), (128, 128, 8, 3, 64))),
        (288, ((64, 128, 4, 3, 64), (128, 64, 4, 4, 64), (128, 128, 8, 3, 64), (64, 128, 4, 3, 128), (128, 64, 8, 4, 128))),
    )
}
"""For chunks of prefill up to so many rows, where nothing has to equal decode bit for bit; the last up to LONGEST."""
LONGEST = 512  # rows: for more the vendor's library, which converts the weights once for all of them
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of the largest GPU: fewer leave bandwidth unused
ENOUGH_WARPS = 528  # four for each, so that some compute while others wait: candidates with fewer are not tried,
MOST_WARPS = 2640  # nor splits that give more
SPLITS_OF_MANY = (1, 2, 4, 8)
ADDED_PER_SECOND = 1e11  # bytes of partial results: the next kernel adds up those of a row on one multiprocessor
ROWS = (1, 8)  # for which a decode step's blocks are timed: one compiled kernel serves both
ROUNDS = 5


class Tuning:
    """Blocks by matrix and dtype of activations."""

    def __init__(self, dtype: torch.dtype, chosen: Mapping[str, Blocks | None] | None = None) -> None:
        self._dtype = dtype
        self._chosen = dict(chosen or {})  # None: the vendor's library, for many rows

    @property
    def measured(self) -> bool:
        """Whether any blocks were measured."""
        return bool(self._chosen)

    def blocks(self, matrix: Matrix, *, gated: bool = False) -> Blocks:
        """The measured blocks, or those of the rule."""
        return self._chosen.get(self._key(matrix, gated)) or default_blocks(matrix, gated=gated)

    def blocks_of_many(self, matrix: Matrix, rows: int, *, gated: bool = False) -> Blocks | None:
        """For more rows than a decode step has: None is `multiply_by_library`, the choice also where nothing was measured."""
        timed = next((most for most in MANY if rows <= most), max(MANY))
        return None if rows > LONGEST else self._chosen.get(self._key(matrix, gated, timed))

    def measure(self, uses: Sequence[tuple[Matrix, bool]]) -> int:
        """Time every candidate on the matrices of each kind that has no blocks yet; returns how many kinds that were.

        uses: matrices and whether their product is gated. A kind is timed over all its matrices in turn, as a decode step
        reads them: one alone would come out of the L2 cache. Needs a GPU and some seconds a kind.
        """
        kinds: dict[str, list[tuple[Matrix, bool]]] = {}
        for matrix, gated in uses:
            kinds.setdefault(self._key(matrix, gated), []).append((matrix, gated))
        missing = {  # a file of an older version may know a kind and not all its numbers of rows
            key: alike
            for key, alike in kinds.items()
            if not self._chosen.keys() >= {self._key(*alike[0], rows) for rows in (0, *MANY)}
        }
        self._compile([alike[0] for alike in missing.values()])
        for key, alike in missing.items():
            matrices = [matrix for matrix, _ in alike]
            self._chosen[key] = self._fastest(matrices, gated=alike[0][1])
            for rows in MANY:
                self._chosen[self._key(*alike[0], rows)] = self._fastest_of_many(matrices, rows, gated=alike[0][1])
            log.info("blocks of %s: %s", key, self._chosen[key])
        return len(missing)

    def save(self, folder: Path) -> None:
        """Write the choices for this torch, Triton and GPU."""
        folder.mkdir(parents=True, exist_ok=True)
        choices = {key: blocks and asdict(blocks) for key, blocks in sorted(self._chosen.items())}
        (folder / file_name()).write_text(json.dumps(choices, indent=1) + "\n", "utf-8")

    @staticmethod
    def load(folder: Path | None, dtype: torch.dtype) -> Tuning:
        """The choices made for exactly this torch, Triton and GPU; none if there is no such file."""
        file = folder / file_name() if folder else None
        if file is None or not file.is_file():
            return Tuning(dtype)
        return Tuning(dtype, {key: value and Blocks(**value) for key, value in json.loads(file.read_text("utf-8")).items()})

    def _compile(self, uses: Sequence[tuple[Matrix, bool]]) -> None:
        """Compile every candidate, on all cores at once: most of what measuring takes.

        What cannot be compiled fails again where it is timed.
        """
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for matrix, gated in uses:
                for blocks in _candidates(matrix, gated=gated):
                    multiply(matrix, *self._operands(matrix, blocks, gated=gated), blocks, gated=gated, compile_only=True)
                for rows in MANY:
                    for blocks in _candidates_of_many(matrix, rows, gated=gated):
                        operands = self._operands(matrix, blocks, rows=rows, gated=gated)
                        multiply(matrix, *operands, blocks, gated=gated, compile_only=True)

    def _operands(self, matrix: Matrix, blocks: Blocks, *, rows: int = 1, gated: bool = False) -> tuple[Tensor, Tensor]:
        """Random rows, and where their product goes."""
        x = torch.randn(rows, matrix.in_features, device=matrix.weight.device).to(self._dtype)
        width = matrix.out_features // 2 if gated else matrix.out_features
        whole = gated or (rows > FEW_ROWS and blocks.splits == 1)
        return x, torch.empty(blocks.splits, rows, width, device=x.device, dtype=self._dtype if whole else torch.float32)

    def _fastest(self, matrices: Sequence[Matrix], *, gated: bool) -> Blocks:
        timings = {
            blocks: sum(self._time(matrices, blocks, rows=rows, gated=gated) for rows in ROWS)
            for blocks in _candidates(matrices[0], gated=gated)
        }
        return min(timings, key=lambda blocks: timings[blocks])

    def _fastest_of_many(self, matrices: Sequence[Matrix], rows: int, *, gated: bool) -> Blocks | None:
        timings: dict[Blocks | None, float] = {
            blocks: self._time(matrices, blocks, rows=rows, gated=gated)
            for blocks in _candidates_of_many(matrices[0], rows, gated=gated)
        }
        if timings:
            x = torch.randn(rows, matrices[0].in_features, device=matrices[0].weight.device).to(self._dtype)
            x_scale = None if matrices[0].activation == "none" else torch.ones(rows, device=x.device)

            def by_library() -> None:  # keeps no result: those of all layers would take more memory than anything that serves
                for matrix in matrices:
                    product = multiply_by_library(matrix, x, x_scale)
                    if gated:
                        gated_gelu(product)

            timings[None] = time_captured(by_library)
        return min(timings, key=lambda blocks: timings[blocks], default=None)

    def _time(self, matrices: Sequence[Matrix], blocks: Blocks, *, rows: int = 1, gated: bool = False) -> float:
        """Seconds of the rows through all the matrices, and of adding up what splits leave; infinite for blocks that the GPU
        cannot hold.
        """
        x, out = self._operands(matrices[0], blocks, rows=rows, gated=gated)
        try:
            multiply(matrices[0], x, out, blocks, gated=gated)
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        seconds = time_captured(lambda: [multiply(matrix, x, out, blocks, gated=gated) for matrix in matrices])
        rows_in_turn = -(-rows // (ENOUGH_PROGRAMS // 2))
        return seconds + len(matrices) * rows_in_turn * out[1:, 0].nbytes / ADDED_PER_SECOND

    def _key(self, matrix: Matrix, gated: bool, rows: int = 0) -> str:
        """rows: of MANY, 0 for a decode step."""
        return f"{matrix.key}{':pairs' if gated else ''}:{str(self._dtype)[6:]}{f':{rows} rows' if rows else ''}"


def _candidates(matrix: Matrix, *, gated: bool) -> list[Blocks]:
    """Those that give every split the same work, and enough warps. A gated product cannot be split: it is needed whole."""
    block = 2 * matrix.half  # of int4
    one_step = (Blocks(outputs, inputs, matrix.in_features // inputs, warps, 1) for outputs, inputs, warps in ONE_STEP)
    single = (blocks for blocks in one_step if 1 < blocks.splits <= MOST_SPLITS and block in (0, blocks.inputs))
    several = {replace(blocks, inputs=block or blocks.inputs): None for blocks in CANDIDATES}
    possible = [
        blocks
        for blocks in (*several, *single)
        if blocks.splits == 1 or (not gated and matrix.in_features % (blocks.splits * blocks.inputs) == 0)
    ]

    def warps(blocks: Blocks) -> int:
        return -(-matrix.out_features // blocks.outputs) * blocks.splits * blocks.warps

    few = min(ENOUGH_WARPS, max(map(warps, possible)) // 2)
    return [blocks for blocks in possible if few <= warps(blocks) and (blocks.splits == 1 or warps(blocks) <= MOST_WARPS)]


def _candidates_of_many(matrix: Matrix, rows: int, *, gated: bool) -> list[Blocks]:
    """Those of MANY in as many splits as give the largest GPU one to four programs a multiprocessor, if that is possible.

    Gated ones are whole. None where results would take more memory than the library's weights: a head, which no chunk needs
    for every row.
    """
    if 4 * rows * (matrix.out_features // 2 if gated else matrix.out_features) > PIECE_BYTES:
        return []
    found: dict[Blocks, None] = {}
    for blocks in MANY[rows]:
        tiles = triton.cdiv(matrix.out_features, blocks.outputs) * triton.cdiv(rows, blocks.rows)
        several = [splits for splits in SPLITS_OF_MANY if ENOUGH_PROGRAMS // 2 <= tiles * splits < 2 * ENOUGH_PROGRAMS]
        for splits in [1] if gated else several or [1]:
            found[replace(blocks, inputs=2 * matrix.half or blocks.inputs, splits=splits)] = None
    return list(found)


def default_blocks(matrix: Matrix, *, gated: bool) -> Blocks:
    """As many splits (up to 4) as fill the GPU and leave each program two steps or more."""
    blocks = Blocks(inputs=2 * matrix.half) if matrix.group else Blocks()
    programs = -(-matrix.out_features // blocks.outputs)
    splits = 1
    while not gated and splits < 4 and programs * splits < ENOUGH_PROGRAMS and matrix.in_features >= 4 * splits * blocks.inputs:
        splits *= 2
    return replace(blocks, splits=splits)


def time_captured(launch: Callable[[], object]) -> float:
    """Seconds of what `launch` puts on the GPU, without the time the host takes to launch it: median of graph replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    graph.replay()
    seconds: list[float] = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return sorted(seconds)[ROUNDS // 2]


def file_name() -> str:
    """Names the choices' file after everything they depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return re.sub(r"[^\w.+-]+", "-", f"triton-blocks_torch-{torch.__version__}_triton-{triton.__version__}_{device}.json")
