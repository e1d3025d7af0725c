"""Stage `peers`: transformers on the same random bf16 weights, dynamic cache and static cache + compile; llama.cpp if built.

Our own step is measured beside them in the same run, so that ratios are of one machine in one state.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import decode, random_gguf
from benchmarks.gpu.common import DEVICE, Results, copy_gb_s, peak_bytes, random_model, reset_peak, synchronize

PROMPT_TOKENS, REPLY_TOKENS = 512, 64


def run(results: Results, shape: str, llama_bench: Path | None, gguf: Path | None) -> None:
    """Ours in int8 and bf16, then the peers."""
    ceiling = copy_gb_s()
    for stored in ("int8", "bf16"):
        results.measure(f"ours {stored}", lambda s=stored: decode.measure(shape, s, ceiling))
    results.measure("transformers bf16, dynamic cache", lambda: transformers(shape, compiled=False))
    if llama_bench:
        results.measure("llama.cpp Q8_0", lambda: llama(llama_bench, gguf or random_file(shape)))
    results.measure("transformers bf16, static cache, compiled", lambda: transformers(shape, compiled=True))


@torch.inference_mode()
def transformers(shape: str, *, compiled: bool) -> dict[str, object]:
    """`generate`, greedy, one row: seconds of a long reply less those of a short one, per token between."""
    reset_peak()
    model = random_model(shape, "bf16")
    ids = torch.randint(300, 1000, (1, PROMPT_TOKENS), device=DEVICE)
    settings = (
        {"cache_implementation": "static"} if compiled else {}
    )  # generate compiles a static cache's steps itself on a GPU

    def seconds(tokens: int) -> float:
        synchronize()
        started = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **settings
        )
        synchronize()
        return time.perf_counter() - started

    first_s = seconds(REPLY_TOKENS)
    rounds = [(seconds(1), seconds(REPLY_TOKENS)) for _ in range(3)]
    step_s = min(long - short for short, long in rounds) / (REPLY_TOKENS - 1)
    return {
        "tokens_per_second": 1 / step_s,
        "prompt_tokens": PROMPT_TOKENS,
        "first_token_ms": 1e3 * min(short for short, _ in rounds),
        "compile_and_first_run_s": round(first_s, 1),
        "peak_bytes": peak_bytes(),
    }


def random_file(shape: str) -> Path:
    """Random weights in Q8_0, written once."""
    path = ROOT / "build" / f"{shape}-random-q8_0.gguf"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        random_gguf.write(shape, path)
    return path


def llama(bench: Path, gguf: Path) -> dict[str, object]:
    """llama-bench's own figures, all layers on the GPU, at the same depth of context."""
    tokens = ["-p", "0", "-n", str(REPLY_TOKENS), "-d", str(PROMPT_TOKENS)]
    command = [bench, "-m", gguf, "-ngl", "99", "-fa", "1", *tokens, "-o", "json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)  # a program the caller named
    row = json.loads(run.stdout)[0]
    return {"tokens_per_second": row["avg_ts"], "llama_bench": row}
