"""The filter map and the plan, on the true shapes (meta device) and on tiny models."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Gemma3ForCausalLM

from gemma_opt.errors import CorruptCheckpoint, PlanError
from gemma_opt.policy import Plan, PlanRow, Role, dropped_count, main_parameter, plan, planned_weights, role_of
from gemma_opt.recipe import Bf16, Recipe, Tied, packaged_recipes
from tests.shapes import gemma_1b, gemma_4b, gemma_270m, recipe, small_text_model

TEXT_LINEARS = {Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT, Role.GATE, Role.UP, Role.DOWN}
MAGNITUDE = {"method": "magnitude", "ratio": 0.5}


@pytest.fixture(scope="module")
def plan_4b() -> Plan:
    stage = MAGNITUDE | {"roles": [*sorted(TEXT_LINEARS), "vision"]}
    return plan(gemma_4b(), recipe(stage, dtype="bfloat16", default="int8", roles={"vision": "int8"}))


def linears(drawn: Plan, roles: set[Role]) -> list[PlanRow]:
    return [row for row in drawn.rows if row.role in roles and row.kind == "linear"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.language_model.layers.33.self_attn.q_proj", Role.QUERY),
        ("language_model.model.layers.0.self_attn.k_proj", Role.KEY),
        ("model.layers.0.self_attn.v_proj", Role.VALUE),
        ("layers.7.self_attn.o_proj", Role.OUTPUT),
        ("model.layers.12.mlp.gate_proj", Role.GATE),
        ("model.language_model.layers.1.mlp.up_proj", Role.UP),
        ("model.language_model.layers.1.mlp.down_proj", Role.DOWN),
        ("model.embed_tokens", Role.EMBEDDING),
        ("model.language_model.embed_tokens", Role.EMBEDDING),
        ("lm_head", Role.HEAD),
        ("language_model.lm_head", Role.HEAD),
        ("model.norm", Role.NORM),
        ("model.layers.3.self_attn.q_norm", Role.NORM),
        ("model.language_model.layers.3.pre_feedforward_layernorm", Role.NORM),
        ("model.multi_modal_projector.mm_soft_emb_norm", Role.NORM),
        ("model.vision_tower.post_layernorm", Role.NORM),
        ("vision_tower.vision_model.encoder.layers.26.layer_norm2", Role.NORM),
        ("model.vision_tower.embeddings.patch_embedding", Role.VISION),
        ("model.vision_tower.vision_model.embeddings.position_embedding", Role.VISION),
        ("model.vision_tower.encoder.layers.0.self_attn.out_proj", Role.VISION),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc2", Role.VISION),
        ("multi_modal_projector", Role.PROJECTOR),
        ("model.multi_modal_projector", Role.PROJECTOR),
    ],
)
def test_role_is_found_under_every_releases_prefix(name: str, role: Role) -> None:
    assert role_of(name) is role


@pytest.mark.parametrize(
    "name",
    ["", "model", "model.layers.0", "model.layers.0.mlp.router", "model.layers.x.mlp.up_proj", "my_lm_head", "lm_head.x"],
)
def test_unknown_name_has_no_role(name: str) -> None:
    with pytest.raises(PlanError, match="no role"):
        role_of(name)


def test_counts_of_4b(plan_4b: Plan) -> None:
    text, vision = linears(plan_4b, TEXT_LINEARS), linears(plan_4b, {Role.VISION})
    assert plan_4b.parameters == 4_300_079_472
    assert len(text) == 238
    assert sum(math.prod(row.shape) for row in text) == 3_208_642_560 == 34 * 94_371_840
    assert len(vision) == 162
    assert Counter(row.role for row in plan_4b.rows) == {
        **dict.fromkeys(TEXT_LINEARS, 34),
        Role.EMBEDDING: 1,
        Role.HEAD: 1,
        Role.PROJECTOR: 1,
        Role.VISION: 27 * 6 + 2,
        Role.NORM: 34 * 6 + 1 + 27 * 2 + 1 + 1,
    }


def test_formats_and_bytes_of_4b_int8(plan_4b: Plan) -> None:
    quantized = plan_4b.quantized()
    assert len(quantized) == 238 + 162
    assert {row.kind for row in quantized} == {"linear"}
    assert {str(row.format) for row in plan_4b.rows if row not in quantized} == {"bf16", "tied"}
    up = plan_4b["model.language_model.layers.0.mlp.up_proj"]
    assert up.bytes == 10_240 * 2560 + 4 * 10_240
    fc2 = plan_4b["model.vision_tower.encoder.layers.0.mlp.fc2"]
    assert fc2.shape == (1152, 4304)
    assert fc2.bytes == 1152 * 4304 + 4 * 1152 + 2 * 1152  # weight, scales, bf16 bias
    projector = plan_4b["model.multi_modal_projector"]
    assert (projector.kind, projector.shape, projector.bytes) == ("parameter", (1152, 2560), 2 * 1152 * 2560)
    head = plan_4b["lm_head"]
    assert (head.format, head.parameters, head.bytes) == (Tied(), 0, 0)
    saved = sum(math.prod(row.shape) - 4 * row.shape[0] for row in quantized)  # one byte a weight, less the scales
    assert plan_4b.bytes == 2 * 4_300_079_472 - saved


def test_the_shared_int8_table_of_4b() -> None:
    drawn = plan(gemma_4b(), recipe(dtype="bfloat16", default="int8", roles={"vision": "int8", "embedding": "int8"}))
    table = drawn["model.language_model.embed_tokens"]
    assert table.bytes == 262_208 * 2560 + 4 * 262_208
    assert table in drawn.quantized()
    assert (drawn["lm_head"].bytes, drawn["lm_head"].parameters) == (0, 0)
    assert drawn.bytes == pytest.approx(4.315e9, rel=1e-4)


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, False), (128, False)])
def test_int4_bytes_of_4b(group: int, symmetric: bool) -> None:
    drawn = plan(gemma_4b(), recipe(dtype="bfloat16", default={"format": "int4", "group": group, "symmetric": symmetric}))
    up = drawn["model.language_model.layers.0.mlp.up_proj"]
    groups = 10_240 * 2560 // group
    assert up.bytes == 10_240 * 2560 // 2 + groups * (2 if symmetric else 3)
    assert str(up.format) == f"int4 g{group}{' sym' if symmetric else ''}"


def test_shapes_that_a_format_cannot_hold_are_listed_at_once() -> None:
    """SigLIP's fc2 reads 4304 features, which no int4 group divides; nothing is skipped silently."""
    with pytest.raises(PlanError) as caught:
        plan(gemma_4b(), recipe(dtype="bfloat16", roles={"vision": "int4", "up": {"format": "int4", "group": 128}}))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        f"  model.vision_tower.encoder.layers.{layer}.mlp.fc2 [1152, 4304] cannot be int4 g32: "
        "rows of 4304 do not divide into groups of 32"
        for layer in range(27)
    ]


def test_shapes_are_judged_after_compact_removal() -> None:
    model, compact = small_text_model(), {"method": "compact", "ratio": 0.3, "multiple": 32}
    with pytest.raises(PlanError, match=r"down_proj \[32, 48\] cannot be int4 g32: rows of 48"):
        plan(model, recipe(default="int4"))
    rules = Recipe.from_tree(
        {
            "name": "narrow",
            "model": {"base": "small-gemma3", "dtype": "float32"},
            "calibration": {"source": ["charts"]},
            "sparsity": [compact],
            "quantization": {"default": "int4"},
        },
        "test",
    )
    drawn = plan(model, rules)
    assert drawn["model.layers.0.mlp.down_proj"].shape == (32, 32)
    assert drawn["model.layers.0.mlp.down_proj"].bytes == 32 * 16 + 32 * 3


def test_prunable_of_4b(plan_4b: Plan) -> None:
    stage = recipe(MAGNITUDE, dtype="bfloat16").sparsity[0]
    assert len(plan_4b.prunable(stage)) == 238
    asked = {row.role for row in plan_4b.rows if row.ratio is not None}
    assert asked == TEXT_LINEARS | {Role.VISION}
    assert plan_4b["model.vision_tower.embeddings.patch_embedding"].ratio is None


def test_plain_bf16_is_two_bytes_a_parameter() -> None:
    assert plan(gemma_4b(), recipe(dtype="bfloat16")).bytes == 2 * 4_300_079_472


def test_counts_of_text_only_models() -> None:
    one, small = plan(gemma_1b(), recipe()), plan(gemma_270m(), recipe())
    assert (one.parameters, len(linears(one, TEXT_LINEARS))) == (999_885_952, 26 * 7)
    assert (small.parameters, len(linears(small, TEXT_LINEARS))) == (268_098_176, 18 * 7)


def test_formats_by_role() -> None:
    drawn = plan(small_text_model(), recipe(default="int8", roles={"query": "fp32", "down": "fp16", "embedding": "fp16"}))
    formats = {row.role: str(row.format) for row in drawn.rows}
    assert formats == {
        **dict.fromkeys(TEXT_LINEARS, "int8"), Role.QUERY: "fp32", Role.DOWN: "fp16",
        Role.EMBEDDING: "fp16", Role.HEAD: "tied", Role.NORM: "fp32",
    }  # fmt: skip


def test_ratio_is_the_largest_asked_and_can_be_filled_in() -> None:
    drawn = plan(small_text_model(), recipe(MAGNITUDE, {"method": "rows", "ratio": 0.25, "roles": ["up"]}))
    assert drawn["model.layers.0.mlp.up_proj"].ratio == 0.5
    filled = drawn.with_ratios({"model.layers.0.mlp.up_proj": 0.125})
    assert filled["model.layers.0.mlp.up_proj"].ratio == 0.125
    assert filled["model.layers.1.mlp.up_proj"].ratio == 0.5


def test_json_round_trip(plan_4b: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan_4b.to_json()))) == plan_4b


DAMAGE: tuple[dict[str, object], ...] = (
    {"role": "queen"}, {"format": "int3"}, {"format": {"format": "int4", "group": 48}}, {"shape": "wide"}, {"bytes": None},
    {"colour": "red"},
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_json_is_refused(damage: dict[str, object]) -> None:
    rows = plan(small_text_model(), recipe()).to_json()
    with pytest.raises(CorruptCheckpoint, match=next(iter(damage))):
        Plan.from_json([rows[0] | damage])


def test_every_offender_is_listed_at_once() -> None:
    model = small_text_model()
    model.get_submodule("model.layers.0.mlp").register_module("router", nn.Linear(2, 2))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    stages = (
        {"method": "rows", "ratio": 0.01, "roles": ["key", "vision"]},
        {"method": "rows", "ratio": 0.3, "roles": ["vision"]},
        {"method": "magnitude", "ratio": 0.01, "pattern": "per_row", "roles": ["up"]},
    )
    with pytest.raises(PlanError) as caught:
        plan(model, recipe(*stages, roles={"vision": "int8"}))
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip().rsplit(" ", 3)[0] if "would drop" in line else line.strip() for line in lines] == [
        "model.layers.0.mlp.router: no role is known for this Linear; is this a Gemma 3?",
        "lm_head: has a weight of its own, and only a head tied to the embedding is supported",
        "sparsity.0 (rows): model.layers.0.self_attn.k_proj [16, 32]: a ratio of 0.01 would drop",
        "sparsity.0 (rows): model.layers.1.self_attn.k_proj [16, 32]: a ratio of 0.01 would drop",
        "sparsity.1 (rows): the model has no vision layer",
        "sparsity.2 (magnitude): model.layers.0.mlp.up_proj [48, 32]: a ratio of 0.01 would drop",
        "sparsity.2 (magnitude): model.layers.1.mlp.up_proj [48, 32]: a ratio of 0.01 would drop",
    ]


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if name.startswith("gemma-3-4b")])
@pytest.mark.parametrize("build", [gemma_270m, gemma_1b])
def test_the_recipes_of_the_4b_take_the_text_only_sizes(
    build: Callable[[], Gemma3ForCausalLM], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They name the vision role, which a text-only model does not have: refused once, whatever `plan --help` said."""
    chosen = Recipe.load(name)
    with caplog.at_level(logging.INFO):
        planned = plan(build(), chosen)
    assert Role.VISION not in {row.role for row in planned.rows}
    assert ("of vision is left out" in caplog.text) == (chosen.quantization.roles.vision != Bf16())


def test_a_stage_leaves_out_vision_where_the_model_has_none() -> None:
    stage = {"method": "rows", "ratio": 0.5, "roles": ["key", "vision"]}
    assert [row.name for row in plan(small_text_model(), recipe(stage)).rows if row.ratio] == [
        f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)
    ]


def test_a_context_beyond_the_positions_is_refused_before_any_work() -> None:
    """It was found by the service, after the whole build."""
    chosen = Recipe.load("gemma-3-4b-int8", ("engine.context=40000",))
    with pytest.raises(PlanError, match=r"engine.context is 40,000, and this model's positions end at 32,768"):
        plan(gemma_1b(), chosen)


def test_a_layer_may_not_be_emptied() -> None:
    model = small_text_model()
    model.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(1, 2, bias=False))
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.up_proj \[2, 1\]: a ratio of 0.8 would drop 2 of 2"):
        plan(model, recipe(MAGNITUDE | {"ratio": 0.8}))


def test_a_shared_linear_is_refused() -> None:
    model = small_text_model()
    first, second = (model.get_submodule(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1))
    second.register_parameter("weight", main_parameter(first))
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.up_proj: shares its weight with model\.layers\.0\.mlp\.up_proj"):
        plan(model, recipe())


def test_an_empty_model_without_its_tie_plans_as_tied() -> None:
    """accelerate's empty models give lm_head a parameter of its own: 4B was planned with 0.67 GB too much."""
    config = small_text_model().config
    with init_empty_weights(include_buffers=False):
        empty = Gemma3ForCausalLM(config)
    assert empty.lm_head.weight is not empty.model.embed_tokens.weight
    assert plan(empty, recipe()) == plan(small_text_model(), recipe())


def test_planned_weights_lists_what_is_not_there() -> None:
    model = small_text_model()
    drawn = plan(model, recipe())
    assert planned_weights(model, drawn.rows).keys() == drawn.by_name.keys()
    model.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(3, 2))
    model.set_submodule("model.layers.1.mlp", nn.Identity())
    with pytest.raises(PlanError) as caught:
        planned_weights(model, drawn.rows)
    assert str(caught.value).count("has no parameters there") == 3
    assert "layers.0.mlp.up_proj: has shape [2, 3], planned was [48, 32]" in str(caught.value)


def test_counts_round_half_to_even() -> None:
    assert [dropped_count(size, 0.5) for size in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert dropped_count(16, 0.25) == 4


def test_small_models_are_reproducible() -> None:
    first, again, other = (small_text_model(seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
