"""llama.cpp as a contestant of benchmarks/decode.py: run by a Python that has llama-cpp-python and numpy, and nothing of ours.

    python llama_worker.py quantize SOURCE.gguf TARGET.gguf    Q8_0 of the same weights
    python llama_worker.py serve MODEL.gguf THREADS CONTEXT    rounds of work, JSON lines on stdin and stdout

Speaks the protocol of benchmarks/decode_worker.py.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import llama_cpp  # pyright: ignore[reportMissingImports] - not a dependency: see above
import numpy as np


def quantize(source: str, target: str) -> None:
    """Write SOURCE's weights as Q8_0, whatever they are stored as."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize {source}")


def serve(path: str, threads: int, context: int) -> None:
    """Answer rounds until stdin ends. One position after another, flash attention as llama.cpp chooses it."""
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_parameters)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
    parameters.n_threads = parameters.n_threads_batch = threads
    runner = llama_cpp.llama_init_from_model(model, parameters)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(runner, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama.cpp could not decode")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits(runner), (vocabulary,)).argmax())

    def reply(**values: object) -> None:
        print(json.dumps(values), flush=True)

    reply(ready=True, weight_bytes=Path(path).stat().st_size, version=llama_cpp.__version__)
    for line in sys.stdin:
        work = json.loads(line)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(runner), True)
        started = time.perf_counter()
        tokens = [step(work["prompt"])]
        times = [time.perf_counter() - started]
        for _ in range(work["tokens"] - 1):
            tokens.append(step(tokens[-1:]))
            times.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        reply(times=times, tokens=tokens, peak_bytes=peak)


if __name__ == "__main__":
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp's own log
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:4])
    else:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
