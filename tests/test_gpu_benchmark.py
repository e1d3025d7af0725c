"""The GPU stages' scripts on a machine without one: that they run, go on where they were, and feed no zeros."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from benchmarks.gpu import decode, engine
from benchmarks.gpu.common import Results, random_model
from benchmarks.gpu.random_gguf import random_q8_0
from gemma_opt.engine.packed import Int4Rows, Int8Rows
from gemma_opt.engine.weights import take_weights

SHAPE = "small-gemma3"


def in_time(stage: str, folder: Path) -> Results:
    return Results(stage, time.monotonic() + 600, folder)


@pytest.mark.parametrize(("stored", "form"), [("int8", Int8Rows), ("int4-g32", Int4Rows)])
def test_random_models_have_the_stored_form_and_no_zero_matrices(stored: str, form: type) -> None:
    weights = take_weights(random_model(SHAPE, stored), release=True)
    matrices = [matrix for layer in weights.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    assert all(isinstance(matrix, form) for matrix in matrices)
    assert isinstance(weights.head, Int8Rows)
    assert weights.dtype == torch.bfloat16
    assert all(matrix.dequantize().std() > 0 for matrix in matrices if isinstance(matrix, Int4Rows))


def test_stages_run_and_a_second_run_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "STEPS", 4)
    monkeypatch.setattr(engine, "REPLY_TOKENS", 4)
    monkeypatch.setattr(engine, "REPEATS", 2)
    decode.run(in_time("decode", tmp_path), SHAPE, ("int8",))
    engine.run(in_time("engine", tmp_path), SHAPE, ("int8",))
    steps = json.loads((tmp_path / "gpu_decode.json").read_text("utf-8"))["int8"]
    assert steps["rows_do_not_depend_on_each_other"]
    assert [entry["rows"] for entry in steps["greedy"]] == list(decode.ROWS)
    many = json.loads((tmp_path / "gpu_engine.json").read_text("utf-8"))["int8, 16 slots"]
    assert many["counters"]["pictures_encoded"] == 2 + 1  # the warm-up's too
    assert many["counters"]["decoded_tokens"] >= 2 * 4 * sum(engine.TOGETHER)

    def fail() -> dict[str, object]:
        raise AssertionError("measured again")

    in_time("decode", tmp_path).measure("int8", fail)


def test_an_entry_is_not_begun_when_time_is_out(tmp_path: Path) -> None:
    Results("decode", time.monotonic() - 1, tmp_path).measure("int8", dict)
    assert not (tmp_path / "gpu_decode.json").exists()


def test_random_q8_0_blocks_are_what_gguf_reads() -> None:
    data = random_q8_0(np.random.default_rng(0), 8, 256)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert values.shape == (8, 256)
    assert abs(values.std() - 256**-0.5) < 0.1 * 256**-0.5
