"""`python -m benchmarks.gpu STAGE`: probe, kernels, decode, engine, peers. Each ends within `--minutes` and can be run again.

Nothing is downloaded: models of the published 4B shape get random weights on the spot. Results are committed as
benchmarks/results/gpu_STAGE.json. `--shape small-gemma3` tries a stage out on the bundled model's shape, on a CPU too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.environment import RESULTS
from benchmarks.gpu import decode, engine, peers
from benchmarks.gpu.common import Results

PROBE = Path(__file__).parents[1] / "gpu_probe.py"


class Stage(StrEnum):
    """What to measure."""

    PROBE = "probe"
    KERNELS = "kernels"
    DECODE = "decode"
    ENGINE = "engine"
    PEERS = "peers"


def main(
    stage: Stage,
    shape: Annotated[str, typer.Option(help="published size, or small-gemma3")] = "gemma-3-4b",
    formats: Annotated[str, typer.Option(help="comma-separated: int8, int8-dynamic, int4-g128, int4-g32, bf16")] = "",
    minutes: Annotated[float, typer.Option(help="begin nothing after this")] = 7.0,
    out: Annotated[Path, typer.Option(help="folder of the result files")] = RESULTS,
    llama_bench: Annotated[Path | None, typer.Option(help="llama.cpp's llama-bench, built with CUDA")] = None,
    gguf: Annotated[Path | None, typer.Option(help="a Q8_0 file for it; by default random weights")] = None,
) -> None:
    """Run one stage."""
    results = Results(stage.value, time.monotonic() + 60 * minutes, out)
    chosen = tuple(formats.split(",")) if formats else ()
    match stage:
        case Stage.PROBE:
            subprocess.run([sys.executable, str(PROBE), "--out", str(results.path)], check=True)
        case Stage.KERNELS:
            from benchmarks.gpu import kernels  # needs Triton

            kernels.run(results, shape)
        case Stage.DECODE:
            decode.run(results, shape, chosen or decode.FORMATS)
        case Stage.ENGINE:
            engine.run(results, shape, chosen or engine.FORMATS)
        case Stage.PEERS:
            peers.run(results, shape, llama_bench, gguf)


if __name__ == "__main__":
    typer.run(main)
