"""The planner: against the arithmetic worked out by hand for the 4B, and against the bytes torch really allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import allocated_bytes, fresh_model
from torch import nn
from transformers import StaticCache

from gemma_opt import gemma
from gemma_opt.errors import UsageError
from gemma_opt.pipeline import compress
from gemma_opt.policy import Role
from gemma_opt.policy import plan as make_plan
from gemma_opt.quantization import quantize_
from gemma_opt.recipe import Recipe
from gemma_opt.shapes import TEXT, shape_name
from gemma_opt.sizing import GPUS, KvCache, Sizing, find_gpus, size_up
from tests.shapes import recipe

INT8 = Recipe.load("gemma-3-4b-int8")
BF16 = Recipe.load("gemma-3-4b-bf16")


# The published shapes


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
        ("gemma-3-4b", 4_300_079_472),
        ("gemma-3-12b", 12_187_325_040),
        ("gemma-3-27b", 27_432_406_640),
    ],
)
def test_shapes_have_the_published_parameter_counts(shape: str, parameters: int) -> None:
    sized = size_up(recipe(dtype="bfloat16"), shape)
    assert sum(part.parameters for part in sized.weights) == parameters
    assert sized.resident_bytes == 2 * parameters


def test_names_and_hub_ids_mean_shapes() -> None:
    assert shape_name("google/gemma-3-4b-it") == shape_name("gemma-3-4b") == "gemma-3-4b"
    assert shape_name("google/gemma-3-27b-pt") == "gemma-3-27b"
    assert shape_name("google/gemma-2-2b-it") is None
    assert shape_name("small-gemma3") is None


# The 4B, figures from the project's own arithmetic


def test_the_4b_in_bf16() -> None:
    sized = size_up(BF16)
    assert sized.model == "gemma-3-4b"
    assert sized.resident_bytes == pytest.approx(8.60e9, rel=1e-3)
    assert sized.read_bytes == pytest.approx(7.76e9, rel=1e-3)
    speeds = {name: sized.tokens_per_second(GPUS[name]) for name in ("l40s", "h100", "h200")}
    assert speeds == pytest.approx({"l40s": 110, "h100": 428, "h200": 613}, abs=0.6)


def test_the_4b_in_int8() -> None:
    sized = size_up(INT8)
    assert sized.resident_bytes == pytest.approx(4.31e9, rel=2e-3)
    assert sized.read_bytes == pytest.approx(3.88e9, rel=2e-3)
    speeds = {name: sized.tokens_per_second(GPUS[name]) for name in ("l40s", "h100", "h200")}
    assert speeds == pytest.approx({"l40s": 218, "h100": 847, "h200": 1214}, abs=1)


def test_the_4b_kv_cache_grows_slowly_beyond_the_window() -> None:
    kv = size_up(INT8).kv
    assert kv == KvCache(window=1024, token_bytes=136 * 1024, late_token_bytes=20 * 1024)
    assert kv.bytes_at(0) == 0
    assert kv.bytes_at(1024) == 1024 * 136 * 1024
    assert kv.bytes_at(8192) == 1024 * 136 * 1024 + (8192 - 1024) * 20 * 1024
    assert size_up(INT8, context=750).kv_bytes == pytest.approx(0.104e9, rel=5e-3)


@pytest.mark.parametrize(("name", "peak"), [("int8", 4.6e9), ("int4", 3.4e9), ("int4-g128", 3.1e9)])
def test_the_4b_at_750_tokens_peaks_below_its_goal(name: str, peak: float) -> None:
    assert size_up(Recipe.load(f"gemma-3-4b-{name}"), context=750).total_bytes < peak


def test_slots_share_the_weights_and_not_the_cache() -> None:
    one, eight = size_up(INT8, slots=1), size_up(INT8, slots=8)
    assert eight.kv_bytes == 8 * one.kv_bytes
    assert eight.resident_bytes == one.resident_bytes
    gpu = GPUS["l40s"]
    alone, together = one.tokens_per_second(gpu), eight.tokens_per_second(gpu, 8)
    assert 6 * alone < together < 8 * alone
    assert together == pytest.approx(8 * 864e9 / (eight.read_bytes + 8 * eight.kv.bytes_at(512)))


# Bytes that are really allocated


def true_shape_4b(text_layers: int, vision_layers: int, vocabulary: int) -> gemma.GemmaModel:
    """A 4B in every width, with fewer layers and constant bfloat16 weights."""
    config = gemma.named_config("gemma-3-4b")
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.layer_types = text_layers, text.layer_types[6 - text_layers : 6]
    vision.num_hidden_layers, text.vocab_size = vision_layers, vocabulary
    model = gemma.empty_model(config, torch.bfloat16)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            real = nn.Parameter(torch.full(weight.shape, 0.01, dtype=weight.dtype), requires_grad=False)
            module.register_parameter(name, real)
    gemma.tie_head_(model)
    return model


@pytest.fixture(scope="module")
def true_table_bytes() -> int:
    """The whole int8 table of the 4B with one vision layer, and all that has no layer: projector, norms, patches."""
    model = true_shape_4b(0, 1, 262_208)
    quantize_(model, make_plan(model, INT8))
    return allocated_bytes(model)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("int8", 4.35e9), ("int4", 3.25e9), ("int4-g128", 2.95e9)])
def test_the_4b_plans_are_confirmed_by_layers_of_the_true_shape(name: str, most: float, true_table_bytes: int) -> None:
    quick = ("quantization.default.method=rtn", "quantization.default.smooth=null")  # bytes do not ask how a grid was found
    chosen = Recipe.load(f"gemma-3-4b-{name}", quick if "int4" in name else ())
    found = {layers: allocated_bytes(true_shape_4b_quantized(chosen, *layers)) for layers in ((2, 1), (0, 1), (0, 2))}
    text, vision = (found[2, 1] - found[0, 1]) // 2, found[0, 2] - found[0, 1]
    whole = true_table_bytes + 34 * text + 26 * vision
    assert size_up(chosen).resident_bytes == whole <= most


def true_shape_4b_quantized(chosen: Recipe, text_layers: int, vision_layers: int) -> gemma.GemmaModel:
    model = true_shape_4b(text_layers, vision_layers, 64)
    quantize_(model, make_plan(model, chosen))
    return model


@pytest.mark.parametrize("name", ["small-bf16", "small-int8", "small-int8-pruned", "small-int4"])
def test_weights_are_the_bytes_allocated(name: str) -> None:
    chosen, model = Recipe.load(name), fresh_model()
    compress(model, chosen)
    assert size_up(chosen).resident_bytes == allocated_bytes(model)


def test_stored_bytes_are_the_plans() -> None:
    sized = size_up(Recipe.load("small-int8"))
    assert sized.stored_bytes == sum(part.stored_bytes for part in sized.weights)
    assert sized.stored_bytes < sized.resident_bytes  # the projector: bf16 in the file, float32 in memory


@pytest.mark.parametrize("tokens", [16, 64, 128, 129, 500])
def test_the_kv_cache_is_what_transformers_allocates(tokens: int) -> None:
    config = gemma.read_config(gemma.BUNDLED["small-gemma3"]).get_text_config()
    cache = StaticCache(config=config, max_cache_len=tokens)
    heads, width = config.num_key_value_heads, config.head_dim
    cache.early_initialization(1, heads, width, torch.float32, torch.device("cpu"))
    real = sum(getattr(layer, name).nbytes for layer in cache.layers for name in ("keys", "values"))
    assert size_up(Recipe.load("small-int8"), context=tokens).kv_bytes == real


def test_embedding_is_read_one_row_at_a_time_and_the_head_whole() -> None:
    parts = {part.role: part for part in size_up(recipe(dtype="bfloat16"), "gemma-3-270m").weights}
    assert parts[Role.EMBEDDING].read_bytes == 640 * 2
    assert parts[Role.HEAD].read_bytes == parts[Role.EMBEDDING].resident_bytes == 262_144 * 640 * 2
    assert parts[Role.HEAD].resident_bytes == 0
    assert Role.VISION not in parts


def test_pictures_are_not_read_again_for_every_token() -> None:
    parts = [part for part in size_up(INT8).weights if part.role in ("vision", "projector")]
    assert parts
    assert all(part.read_bytes == 0 < part.resident_bytes for part in parts)


# Words


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"context": 15}, "context: .* 16 .got 15"),
        ({"context": 200_000}, "context: .* 131072 .got 200000"),
        ({"slots": 65}, "slots: .* 64 .got 65"),
        ({"model": "gemma-3-1b", "context": 40_000}, "positions end at 32,768"),
    ],
)
def test_what_no_recipe_could_serve_is_not_sized_up(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        size_up(INT8, **asked)


def test_json_answers_for_the_asked_gpus() -> None:
    sized = size_up(INT8, slots=4)
    answer = sized.to_json(find_gpus(["L40S", "t4"]))
    assert [gpu["name"] for gpu in answer["gpus"]] == ["L40S", "T4"]  # type: ignore[index, union-attr]
    assert answer["weight_bytes_read_per_token"] == sized.read_bytes
    assert answer["total_bytes"] == sized.resident_bytes + sized.kv_bytes + sized.workspace_bytes


def test_a_27b_does_not_fit_a_24_gb_card() -> None:
    sized: Sizing = size_up(recipe(dtype="bfloat16", default="int8"), "gemma-3-27b")
    fits = {gpu["name"]: gpu["fits"] for gpu in sized.to_json(find_gpus([]))["gpus"]}  # type: ignore[union-attr]
    assert not fits["RTX 4090"]
    assert fits["H100 SXM"]


def test_unknown_things_are_named_with_what_is_known() -> None:
    with pytest.raises(UsageError, match=r"no facts about voodoo2; known GPUs: t4, .*h200"):
        find_gpus(["voodoo2"])
    with pytest.raises(UsageError, match="published size: " + ", ".join(TEXT)):
        size_up(INT8, "gemma-9")
