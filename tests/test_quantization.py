"""Every format against its promise and plain arithmetic, the shared table, and the walk over a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gemma_opt.errors import PlanError, WeightsError
from gemma_opt.layout import float_dtype
from gemma_opt.policy import plan, planned_weights, role_of
from gemma_opt.quantization import (
    Int8Embedding,
    Int8Head,
    Int8Linear,
    QuantizedLinear,
    empty_like_plan_,
    quantize_,
    sanitize_,
    untie_head_,
)
from gemma_opt.quantization.rows import int8_rows
from tests.shapes import recipe, small_model, small_text_model

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pictured() -> nn.Module:
    return small_model()


def int8_of(weight: Tensor) -> Int8Linear:
    """What `quantize_` makes of one weight [48, 32]."""
    model = small_text_model()
    planned_weights(model, plan(model, recipe()).rows)[UP].data = weight.clone()
    quantize_(model, plan(model, recipe(default="int8")))
    layer = model.get_submodule(UP)
    assert isinstance(layer, Int8Linear)
    return layer


def awkward_weight() -> Tensor:
    """Rows of very unlike scales: zeros, one single value, tiny, huge, all positive, all negative, pruned."""
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] = 0
    weight[1, 5] = -3.0
    weight[2] *= 1e-12
    weight[3] *= 1e6
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6, ::2] = 0
    return weight


# One layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_keep_their_promise(dtype: torch.dtype) -> None:
    weight = awkward_weight().to(dtype)
    layer = int8_of(weight)
    exact, scale = weight.double(), layer.weight_scale.double()[:, None]
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert (tuple(layer.weight.shape), tuple(layer.weight_scale.shape)) == ((48, 32), (48,))
    assert (scale > 0).all()
    assert ((exact - layer.weight.double() * scale).abs() <= scale * 0.5001).all()
    assert (layer.weight[weight == 0] == 0).all()


def test_int8_uses_the_whole_range_of_every_row() -> None:
    """torchao divides the largest |w| by 127.5, others by 127: both are promised, a coarser scale is not."""
    layer, peak = int8_of(awkward_weight()), awkward_weight().abs().amax(dim=1)
    scaled = peak > 1e-5  # below, the scale is the floor that keeps it from being zero
    assert scaled.sum() == 46
    assert ((layer.weight_scale >= peak / 128) & (layer.weight_scale <= peak / 127))[scaled].all()
    assert (layer.weight[scaled].int().abs().amax(dim=1) >= 127).all()


def test_scales_of_bf16_weights_are_not_rounded_to_bf16() -> None:
    scale = int8_of(awkward_weight().bfloat16()).weight_scale
    assert not torch.equal(scale, scale.bfloat16().float())


def test_dequantize() -> None:
    layer = int8_of(awkward_weight())
    assert torch.equal(layer.dequantize(), layer.weight.float() * layer.weight_scale.reshape(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 32), (2, 3, 4, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_forward_is_the_dequantized_product(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    made = int8_of(torch.randn(48, 32, generator=torch.Generator().manual_seed(1)))
    layer = Int8Linear(made.weight, made.weight_scale, torch.linspace(-1, 1, 48, dtype=dtype) if biased else None)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    expected = functional.linear(x.double(), layer.dequantize().double(), None if layer.bias is None else layer.bias.double())
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], 48)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_forward_is_one_graph() -> None:
    layer = int8_of(awkward_weight())
    x = torch.randn(3, 32)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


def test_repr_says_what_a_linear_says() -> None:
    assert repr(int8_of(awkward_weight())) == "Int8Linear(in_features=32, out_features=48, bias=False)"


# The shared table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_int8_table_is_transformers_embedding_of_its_dequantized_rows(dtype: torch.dtype) -> None:
    rows, scale = int8_rows(torch.randn(40, 32, generator=torch.Generator().manual_seed(3)))
    table = Int8Embedding(rows, scale, 32**0.5, dtype)
    oracle = Gemma3TextScaledWordEmbedding(40, 32, 0, 32**0.5).requires_grad_(False)
    oracle.weight.copy_(table.dequantize())
    ids = torch.tensor([[3, 39, 0], [7, 7, 21]])
    assert torch.equal(table(ids), oracle.to(dtype)(ids))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    wanted = functional.linear(x.double(), table.dequantize().double())
    torch.testing.assert_close(Int8Head(table)(x).double(), wanted, rtol=tolerance, atol=tolerance)


def test_the_head_multiplies_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scale = int8_rows(torch.randn(40, 32, generator=torch.Generator().manual_seed(3)))
    head, x = Int8Head(Int8Embedding(rows, scale, 1.0, torch.float32)), torch.randn(3, 32)
    whole = head(x)
    monkeypatch.setattr("gemma_opt.quantization.table._HEAD_ROWS", 7)
    torch.testing.assert_close(head(x), whole)


def test_no_move_or_copy_breaks_the_tie() -> None:
    """Buffers under two names would part ways at the first `.to(device)`: the 4B would then hold its table twice."""
    model = small_text_model()
    quantize_(model, plan(model, recipe(default="int8", roles={"embedding": "int8"})))
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    for version in (model, copy.deepcopy(model), copy.deepcopy(model).to("meta")):
        table = version.model.embed_tokens
        assert isinstance(table, Int8Embedding)
        assert isinstance(version.lm_head, Int8Head)
        assert version.lm_head.weight is table.weight
        assert version.lm_head.weight_scale is table.weight_scale


def test_for_export_the_head_can_be_untied() -> None:
    model = small_text_model()
    with pytest.raises(PlanError, match="the head is a Linear"):
        untie_head_(model)
    quantize_(model, plan(model, recipe(default="int8", roles={"embedding": "int8"})))
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        before = model(ids).logits
        untie_head_(model)
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


# The walk over a model


def test_only_the_planned_layers_are_quantized(pictured: nn.Module) -> None:
    model = copy.deepcopy(pictured)
    rules = recipe(default="int8", roles={"vision": "int8", "down": "fp32", "projector": "fp32", "embedding": "fp32"})
    drawn = plan(model, rules)
    calls: list[tuple[int, int, str]] = []
    quantize_(model, drawn, lambda *call: calls.append(call))
    assert [name for _, _, name in calls] == [row.name for row in drawn.rows]
    assert calls[-1][0] == calls[-1][1] == len(drawn.rows)
    names = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(names) == 4 * 6 + 3 * 6  # text without down; vision
    assert {role_of(name).value for name in names} == {"query", "key", "value", "output", "gate", "up", "vision"}
    kept = dict(model.named_parameters())
    for name, parameter in pictured.named_parameters():
        row = drawn[name.rpartition(".")[0]]
        if row.name in names:
            assert name not in kept
        elif row.role != "vision":
            assert torch.equal(kept[name], parameter)
    assert model.get_submodule("lm_head").weight is model.get_submodule("model.language_model.embed_tokens").weight


def test_vision_biases_stay_and_other_vision_weights_become_bf16(pictured: nn.Module) -> None:
    model = copy.deepcopy(pictured)
    quantize_(model, plan(model, recipe(roles={"vision": "int8"})))
    before, after = pictured.state_dict(), model.state_dict()
    fc2 = "model.vision_tower.encoder.layers.0.mlp.fc2"
    assert torch.equal(after[f"{fc2}.bias"], before[f"{fc2}.bias"])
    for name in ("patch_embedding", "position_embedding"):
        full = f"model.vision_tower.embeddings.{name}.weight"
        assert torch.equal(after[full], before[full].bfloat16().float())


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
def test_float_formats_round_and_stay_plain(stored: str) -> None:
    model, before = small_text_model(), small_text_model().state_dict()
    drawn = plan(model, recipe(default=stored, roles={"embedding": stored}))
    quantize_(model, drawn)
    for name, after in model.state_dict().items():
        row = drawn[name.rpartition(".")[0]]
        dtype = torch.float32 if row.role == "norm" else float_dtype(drawn[UP].format)
        assert after.dtype == torch.float32
        assert torch.equal(after, before[name].to(dtype).float())


PACKED = {"default": {"format": "int4"}, "roles": {"down": "int8", "embedding": "int8"}}  # down reads 48: no int4 group
UNSMOOTHED = {"format": "int4", "smooth": None}  # smoothing would change the norms too
MIXED = {"vision": "int8", "query": "fp16", "up": {"format": "int4", "group": 64, "symmetric": True}, "embedding": "int8"}


@pytest.mark.parametrize("formats", [{"vision": "int8", "query": "fp16"}, MIXED, MIXED | {"gate": "int4"}], ids=len)
def test_predicted_bytes_are_the_bytes_of_the_tensors(pictured: nn.Module, formats: dict[str, object]) -> None:
    model = copy.deepcopy(pictured).bfloat16()
    drawn = plan(model, recipe(dtype="bfloat16", default="int8", roles=formats))
    quantize_(model, drawn)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {name.rpartition(".")[0] for name in tensors} | {"lm_head"} == drawn.by_name.keys()
    assert sum(tensor.nbytes for tensor in tensors.values()) == drawn.bytes


@pytest.mark.parametrize("formats", [{"embedding": "fp32"}, {"embedding": "int8", "gate": UNSMOOTHED}], ids=str)
def test_a_quantized_model_computes_with_the_dequantized_weights(pictured: nn.Module, formats: dict[str, object]) -> None:
    model, plain = copy.deepcopy(pictured), copy.deepcopy(pictured)
    formats = {"vision": "int8", "projector": "fp32"} | formats
    quantize_(model, plan(model, recipe(default="int8", roles=formats)))
    weights = planned_weights(plain, plan(plain, recipe()).rows)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | Int8Embedding):
            weights[name].data = module.dequantize()
    inputs = {
        "input_ids": torch.cat((torch.tensor([2, 300]), torch.full((64,), 2047), torch.arange(110, 130)))[None],
        "pixel_values": torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)),
    }
    for name in ("patch_embedding", "position_embedding"):  # stored as bf16 beside int8 linears
        weight = weights[f"model.vision_tower.embeddings.{name}"]
        weight.data = weight.data.bfloat16().float()
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("formats", [{"default": "int8"}, PACKED, {"default": "fp8_dynamic"}], ids=["int8", "packed", "fp8"])
def test_a_quantized_model_loads_strictly_into_an_empty_one(formats: dict[str, object]) -> None:
    model, drawn = small_text_model(), plan(small_text_model(), recipe(**formats))
    quantize_(model, drawn)
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty_like_plan_(empty, drawn)
    assert [(n, type(m)) for n, m in empty.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    wanted, found = model.state_dict(), empty.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    assert all(tensor.is_meta for tensor in found.values())
    empty.load_state_dict(wanted, strict=True, assign=True)
    assert all(torch.equal(tensor.float(), wanted[name].float()) for name, tensor in empty.state_dict().items())


# Refusals


def test_unusable_weights_are_all_named() -> None:
    model = small_text_model()
    weights = planned_weights(model, plan(model, recipe()).rows)
    weights[UP].data[3, 4] = math.nan
    weights["model.norm"].data[0] = -math.inf
    model.set_submodule("model.layers.1.mlp.gate_proj", nn.Linear(32, 48, bias=False, device="meta"))
    with pytest.raises(WeightsError) as caught:
        quantize_(model, plan(model, recipe(default="int8")))
    assert str(caught.value).splitlines()[1:] == [
        f"  {UP}.weight: holds NaN or infinite values",
        "  model.layers.1.mlp.gate_proj.weight: has no data (meta device)",
        "  model.norm.weight: holds NaN or infinite values",
    ]


def test_sanitize_makes_weights_contiguous_and_keeps_the_tie() -> None:
    model = small_text_model()
    weight = planned_weights(model, plan(model, recipe()).rows)[UP]
    values = weight.detach().clone()
    weight.data = values.T.contiguous().T
    sanitize_(model)
    assert weight.is_contiguous()
    assert torch.equal(weight, values)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_fp16_overflow_is_refused_before_anything_changes() -> None:
    model = small_text_model()
    drawn = plan(model, recipe(default="fp16"))
    weights = planned_weights(model, drawn.rows)
    weights[UP].data[0, 0] = -70_000.0
    weights["model.layers.1.mlp.down_proj"].data[0, 0] = 1e6
    weights["model.layers.1.mlp.gate_proj"].data[0, 0] = 65_504.0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        quantize_(model, drawn)
    assert str(caught.value).splitlines()[1:] == [
        f"  {UP}: reaches 70000, beyond fp16",
        "  model.layers.1.mlp.down_proj: reaches 1e+06, beyond fp16",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_model_than_the_planned_one_is_refused() -> None:
    drawn = plan(small_text_model(), recipe(default="int8"))
    model = small_text_model()
    quantize_(model, drawn)
    with pytest.raises(PlanError, match="has no parameters there"):
        quantize_(model, drawn)
    with pytest.raises(PlanError, match="has no parameters there"):
        empty_like_plan_(model, drawn)


def test_an_int8_layer_that_was_not_planned_is_found() -> None:
    model = small_text_model()
    drawn = plan(model, recipe(default="int8"))
    model.register_module("extra", int8_of(awkward_weight()))
    with pytest.raises(PlanError, match="as planned or as found, not both:\n  extra"):
        quantize_(model, drawn)


def test_a_planned_linear_must_be_one() -> None:
    model = small_text_model()
    drawn = plan(model, recipe(default="int8"))
    model.set_submodule(UP, nn.Embedding(48, 32))
    with pytest.raises(PlanError, match="is a Embedding, not a linear"):
        quantize_(model, drawn)


def test_a_planned_table_must_be_an_embedding() -> None:
    model = small_text_model()
    drawn = plan(model, recipe(roles={"embedding": "int8"}))
    model.set_submodule("model.embed_tokens", nn.Linear(32, 128, bias=False))
    with pytest.raises(PlanError, match="is a Linear, not an embedding"):
        quantize_(model, drawn)
