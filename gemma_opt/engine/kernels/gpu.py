"""Which kernels a GPU gets: those in Triton, if it is there and they know the weights, with the blocks measured for it."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from gemma_opt.engine.batch import Batch, Level, Sampler
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.rope import RopeTables
from gemma_opt.engine.weights import TextWeights
from gemma_opt.gemma import weights_device

if TYPE_CHECKING:  # importing them needs Triton
    from gemma_opt.engine.kernels.triton_decode import TritonDecode
    from gemma_opt.engine.kernels.triton_prefill import TritonPrefill

log = logging.getLogger(__name__)

OLDEST = (8, 0)  # compute capability: the first with bfloat16 on its matrix units


def why_not(device: torch.device) -> str | None:
    """Why these kernels do not run on a device; None where they do."""
    if device.type != "cuda":
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "the kernels need a GPU of compute capability 8.0"
    return None


def find_gpu_kernels(
    weights: TextWeights, cache: KvCache, rope: RopeTables, compile_cache: Path | None
) -> tuple[TritonDecode, TritonPrefill] | None:
    """The decode step and prefill; None, with a line in the log, where torch operations must do.

    compile_cache: holds the blocks that `tune` measured for this device, and the kernels compiled for it; without them a
    rule decides about blocks, and the first steps compile.
    """
    if reason := why_not(weights.device):
        log.warning("decoding with torch operations, slowly: %s", reason)
        return None
    from gemma_opt.engine.kernels.triton_compiled import install_compiled
    from gemma_opt.engine.kernels.triton_decode import TritonDecode
    from gemma_opt.engine.kernels.triton_prefill import TritonPrefill
    from gemma_opt.engine.kernels.triton_tuning import Tuning

    if compile_cache:
        log.info("kernels that came with the checkpoint: %d", install_compiled(compile_cache))
    tuning = Tuning.load(compile_cache, weights.dtype)
    log.info("kernel blocks: %s", "measured for this GPU" if tuning.measured else "by the rule, not measured for this GPU")
    return TritonDecode(weights, cache, rope, tuning), TritonPrefill(weights, cache, rope, tuning)


def speed_up_tower_(tower: nn.Module) -> None:
    """Have a vision tower's quantized linears computed by kernels, if this device has some; see `triton_tower`."""
    if not why_not(weights_device(tower)):
        from gemma_opt.engine.kernels.triton_tower import speed_up_

        speed_up_(tower)


def find_samplers(batch: Batch) -> dict[Level, Sampler]:
    """What draws the tokens of each level on the batch's device: two kernels below `Level.ALL`, else torch operations."""
    samplers: dict[Level, Sampler] = {level: partial(batch.advance, level=level) for level in Level}
    if why_not(batch.tokens.device):
        return samplers
    from gemma_opt.engine.kernels.triton_sampling import TritonSampler

    return samplers | {level: TritonSampler(batch, level) for level in (Level.GREEDY, Level.NARROW)}


@contextmanager
def keeping_compiled(compile_cache: Path) -> Generator[list[dict[str, str]]]:
    """Collect the kernels used meanwhile in `compile_cache`; see `keep_compiled`. Nothing without a GPU or Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield []
        return
    from gemma_opt.engine.kernels.triton_compiled import keep_compiled

    with keep_compiled(compile_cache) as kernels:
        yield kernels


def tune(weights: TextWeights, compile_cache: Path) -> None:
    """Measure the best blocks for every kind of matrix of these weights and write them down for this GPU; about a minute.

    Nothing happens where they do not run.
    """
    if why_not(weights.device):
        return
    from gemma_opt.engine.kernels.triton_matrices import uses_of
    from gemma_opt.engine.kernels.triton_tuning import Tuning

    with torch.cuda.device(weights.device):  # Triton launches on the current one
        tuning = Tuning.load(compile_cache, weights.dtype)
        if tuning.measure(uses_of(weights)):
            tuning.save(compile_cache)
