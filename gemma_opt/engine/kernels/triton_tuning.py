"""Which blocks each matrix is cut into: measured once on the GPU at hand, kept in a file beside the compile cache.

The choice knows the matrix and never the number of rows, or results would change with the batch. A file serves exactly the
torch, Triton and GPU it was made with. Without one, and without a measurement, a rule gives sound blocks.
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

from gemma_opt.engine.kernels.triton_library import multiply_by_library
from gemma_opt.engine.kernels.triton_linear import MOST_ROWS, Blocks, Matrix, multiply

log = logging.getLogger(__name__)

CANDIDATES = tuple(
    Blocks(outputs, inputs, splits, warps, stages)
    for outputs, inputs, warps, stages in (
        (16, 128, 1, 6), (16, 256, 1, 3), (16, 256, 1, 4), (16, 512, 1, 3), (32, 128, 2, 5), (32, 256, 2, 3), (32, 256, 2, 4),
        (32, 512, 2, 3),
    )
    for splits in (1, 2, 4, 5, 8, 10)
)  # fmt: skip
ONE_STEP = tuple((outputs, inputs, warps) for outputs, warps in ((16, 1), (32, 2)) for inputs in (256, 512, 1024))
"""Outputs, inputs and warps of blocks that need one step, their splits following from the matrix: see `_linear_kernel`."""
MANY = tuple(
    Blocks(outputs, inputs, 1, warps, stages)
    for outputs, inputs, warps, stages in ((32, 256, 2, 3), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3))
)
"""For MOST_ROWS rows of prefill, where nothing has to equal decode bit for bit."""
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of the largest GPU: fewer leave bandwidth unused
ENOUGH_WARPS = 528  # four for each, so that some compute while others wait: candidates with fewer are not tried,
MOST_WARPS = 2640  # nor splits that give more
MOST_SPLITS = 10  # the next kernel adds them up
MANY_ROWS = f":{MOST_ROWS} rows"
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

    def blocks_of_many(self, matrix: Matrix) -> Blocks | None:
        """For more rows than a decode step has: None is `multiply_by_library`, the choice also where nothing was measured."""
        return self._chosen.get(self._key(matrix, gated=False) + MANY_ROWS)

    def measure(self, uses: Sequence[tuple[Matrix, bool]]) -> int:
        """Time every candidate on the matrices of each kind that has no blocks yet; returns how many kinds that were.

        uses: matrices and whether their product is gated. A kind is timed over all its matrices in turn, as a decode step
        reads them: one alone would come out of the L2 cache. Needs a GPU and some seconds a kind.
        """
        kinds: dict[str, list[tuple[Matrix, bool]]] = {}
        for matrix, gated in uses:
            kinds.setdefault(self._key(matrix, gated), []).append((matrix, gated))
        missing = {key: alike for key, alike in kinds.items() if key not in self._chosen}
        self._compile([alike[0] for alike in missing.values()])
        for key, alike in missing.items():
            matrices = [matrix for matrix, _ in alike]
            self._chosen[key] = self._fastest(matrices, gated=alike[0][1])
            self._chosen[self._key(matrices[0], gated=False) + MANY_ROWS] = self._fastest_of_many(matrices)
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
                for blocks in MANY:
                    multiply(matrix, *self._operands(matrix, blocks, rows=MOST_ROWS), blocks, compile_only=True)

    def _operands(self, matrix: Matrix, blocks: Blocks, *, rows: int = 1, gated: bool = False) -> tuple[Tensor, Tensor]:
        """Random rows, and where their product goes."""
        x = torch.randn(rows, matrix.in_features, device=matrix.weight.device).to(self._dtype)
        width = matrix.out_features // 2 if gated else matrix.out_features
        whole = gated or rows > 1
        return x, torch.empty(blocks.splits, rows, width, device=x.device, dtype=self._dtype if whole else torch.float32)

    def _fastest(self, matrices: Sequence[Matrix], *, gated: bool) -> Blocks:
        timings = {blocks: self._time(matrices, blocks, gated=gated) for blocks in _candidates(matrices[0], gated=gated)}
        return min(timings, key=lambda blocks: timings[blocks])

    def _fastest_of_many(self, matrices: Sequence[Matrix]) -> Blocks | None:
        x, _ = self._operands(matrices[0], MANY[0], rows=MOST_ROWS)
        x_scale = None if matrices[0].activation == "none" else torch.ones(MOST_ROWS, device=x.device)
        by_library = time_captured(lambda: [multiply_by_library(matrix, x, x_scale) for matrix in matrices])
        timings = {blocks: self._time(matrices, blocks, rows=MOST_ROWS) for blocks in MANY}
        best = min(timings, key=lambda blocks: timings[blocks])
        return best if timings[best] < by_library else None

    def _time(self, matrices: Sequence[Matrix], blocks: Blocks, *, rows: int = 1, gated: bool = False) -> float:
        """Seconds of the rows through all the matrices; infinite for blocks that the GPU cannot hold."""
        x, out = self._operands(matrices[0], blocks, rows=rows, gated=gated)
        try:
            multiply(matrices[0], x, out, blocks, gated=gated)
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        return time_captured(lambda: [multiply(matrix, x, out, blocks, gated=gated) for matrix in matrices])

    def _key(self, matrix: Matrix, gated: bool) -> str:
        return f"{matrix.key}{':gated' if gated else ''}:{str(self._dtype)[6:]}"


def _candidates(matrix: Matrix, *, gated: bool) -> list[Blocks]:
    """Those that give every split the same work, and enough warps. A gated product cannot be split: it is needed whole."""
    block = 2 * matrix.half  # of int4
    one_step = (Blocks(outputs, inputs, matrix.in_features // inputs, warps, 1) for outputs, inputs, warps in ONE_STEP)
    few = (blocks for blocks in one_step if 1 < blocks.splits <= MOST_SPLITS and block in (0, blocks.inputs))
    several = {replace(blocks, inputs=block or blocks.inputs): None for blocks in CANDIDATES}
    possible = [
        blocks
        for blocks in (*several, *few)
        if blocks.splits == 1 or (not gated and matrix.in_features % (blocks.splits * blocks.inputs) == 0)
    ]

    def warps(blocks: Blocks) -> int:
        return -(-matrix.out_features // blocks.outputs) * blocks.splits * blocks.warps

    few = min(ENOUGH_WARPS, max(map(warps, possible)) // 2)
    return [blocks for blocks in possible if few <= warps(blocks) and (blocks.splits == 1 or warps(blocks) <= MOST_WARPS)]


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
