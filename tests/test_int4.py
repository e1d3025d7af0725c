"""int4: the grid's arithmetic and packing, HQQ and GPTQ against plain rounding, and grids that a checkpoint already has."""

from __future__ import annotations

import pytest
import torch
from models import fresh_model, processing
from torch import Tensor
from torch.nn import functional

from gemma_opt import gemma, inspection, pipeline
from gemma_opt.calibration import CalibrationData, Sample, Store, draw_samples
from gemma_opt.calibration.walk import model_inputs
from gemma_opt.policy import plan, planned_weights
from gemma_opt.quantization import Int4Linear, grid, quantize_
from gemma_opt.quantization.fit import fitted_grid
from gemma_opt.quantization.gptq import curvature, gptq
from gemma_opt.recipe import Int4, Recipe
from tests.shapes import recipe, small_text_model
from tests.test_quantization import UP, awkward_weight


def samples(count: int = 4) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(Sample(torch.randint(4, 128, (1, 96), generator=generator)) for _ in range(count))


def calibrated(stored: dict[str, object], *stages: dict[str, object]) -> Recipe:
    """A recipe for the tiny text model with a calibration section. Its down reads 48 features, which no group divides."""
    tree = {
        "name": "tiny",
        "model": {"base": "small-gemma3", "dtype": "float32"},
        "calibration": {"source": ["charts"]},
        "sparsity": list(stages),
        "quantization": {"default": stored, "roles": {"down": "int8"}},
    }
    return Recipe.from_tree(tree, "test")


def int4_of(weight: Tensor, **options: object) -> Int4Linear:
    """What `quantize_` makes of one weight [48, 32]."""
    model = small_text_model()
    planned_weights(model, plan(model, recipe()).rows)[UP].data = weight.clone()
    quantize_(model, plan(model, recipe(roles={"up": {"format": "int4", "smooth": None, **options}})))
    layer = model.get_submodule(UP)
    assert isinstance(layer, Int4Linear)
    return layer


def test_nibbles_are_packed_as_the_contract_says() -> None:
    """Column 2i in the low nibble of byte i; a weight is (nibble − zero) · scale."""
    packed = torch.tensor([[0x10, 0x32], [0xFE, 0x0F]], dtype=torch.uint8)
    assert grid.unpack_nibbles(packed).tolist() == [[0, 1, 2, 3], [14, 15, 15, 0]]
    assert torch.equal(grid.pack_nibbles(grid.unpack_nibbles(packed)), packed)
    scale, zero = torch.tensor([[0.5], [2.0]]).bfloat16(), torch.tensor([[1], [15]], dtype=torch.uint8)
    layer = Int4Linear(packed, scale, zero)
    assert layer.dequantize().tolist() == [[-0.5, 0.0, 0.5, 1.0], [-2.0, 0.0, 0.0, -30.0]]
    assert layer.zeros() == 3
    assert (layer.in_features, layer.out_features, layer.group) == (4, 2, 4)
    assert Int4Linear(packed, scale).dequantize().tolist() == [[-4.0, -3.5, -3.0, -2.5], [12.0, 14.0, 14.0, -16.0]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_keeps_its_promise(symmetric: bool) -> None:
    weight = awkward_weight()
    layer = int4_of(weight, symmetric=symmetric, method="rtn")
    assert (layer.weight_packed.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.bfloat16)
    assert (tuple(layer.weight_packed.shape), tuple(layer.weight_scale.shape)) == ((48, 16), (48, 1))
    assert (layer.weight_zero is None) == symmetric
    scale = layer.weight_scale.double()
    # Half a step; at the ends of the range also what rounding scales to bfloat16 (1/256 of 15 steps) and zero points adds.
    allowed = scale * (0.51 + 15 / 256 + (0 if symmetric else 0.5))
    exact = weight.double()
    assert ((exact - layer.dequantize().double()).abs() <= allowed)[exact.abs().amax(dim=1) > 1e-6].all()
    assert (layer.dequantize()[weight == 0] == 0).all()
    assert (layer.weight_scale > 0).all()
    assert layer.zeros() >= int((weight == 0).sum())


def test_asymmetric_groups_use_all_sixteen_steps_where_weights_have_one_sign() -> None:
    layer = int4_of(torch.linspace(0.5, 2.0, 32).expand(48, 32), method="rtn")
    assert layer.weight_zero is not None
    assert (layer.weight_zero == 0).all()
    assert int(grid.unpack_nibbles(layer.weight_packed).max()) == 15
    exact = torch.linspace(0.5, 2.0, 32).expand(48, 32)
    symmetric = int4_of(exact, symmetric=True, method="rtn")
    assert (layer.dequantize() - exact).abs().mean() < 0.6 * (symmetric.dequantize() - exact).abs().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_forward_is_the_dequantized_product(dtype: torch.dtype, symmetric: bool) -> None:
    made = int4_of(torch.randn(48, 32, generator=torch.Generator().manual_seed(1)), symmetric=symmetric)
    layer = Int4Linear(made.weight_packed, made.weight_scale, made.weight_zero, torch.linspace(-1, 1, 48, dtype=dtype))
    x = torch.randn((2, 3, 32), generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    expected = functional.linear(x.double(), layer.dequantize().double(), torch.linspace(-1, 1, 48, dtype=dtype).double())
    assert y.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), y)
    assert repr(layer).endswith(f"bias=True, group=32, symmetric={symmetric})")


# Fitted grids


def normal_groups(seed: int = 0) -> Tensor:
    """[out, groups, group] with a few outliers."""
    weight = torch.randn(64, 4, 32, generator=torch.Generator().manual_seed(seed))
    weight[::7, :, 3] *= 5
    return weight


def squared_error(weight: Tensor, found: grid.Grid, importance: Tensor | None = None) -> Tensor:
    error = (weight - found.values(found.nibbles(weight))).square()
    return (error if importance is None else error * importance).sum(dim=-1)


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fit_is_never_worse_than_plain_rounding_and_clearly_better_on_the_whole(symmetric: bool, weighed: bool) -> None:
    weight = normal_groups()
    importance = torch.rand(4, 32, generator=torch.Generator().manual_seed(4)) if weighed else None
    plain = grid.range_grid(weight, symmetric=symmetric)
    fitted = fitted_grid(weight, symmetric=symmetric, importance=importance)
    before, after = squared_error(weight, plain, importance), squared_error(weight, fitted, importance)
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()
    assert torch.equal(fitted.scale, fitted.scale.bfloat16().float())
    assert ((fitted.zero >= 0) & (fitted.zero <= 15) & (fitted.zero == fitted.zero.round())).all()
    assert not symmetric or (fitted.zero == 8).all()


def test_weights_that_count_more_are_fitted_closer() -> None:
    weight = normal_groups()
    importance = torch.ones(4, 32)
    importance[:, :4] = 100.0
    plain, weighted = fitted_grid(weight, symmetric=True), fitted_grid(weight, symmetric=True, importance=importance)
    errors = [(weight - found.values(found.nibbles(weight))).square()[..., :4].sum() for found in (plain, weighted)]
    assert errors[1] < 0.8 * errors[0]


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def test_gptq_makes_the_output_error_smaller_and_keeps_zeros() -> None:
    weight = normal_groups().flatten(1)
    weight[:, ::5] = 0
    mix = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)) / 8
    hessian = hessian_of(torch.randn(4000, 128, generator=torch.Generator().manual_seed(2)) @ mix)
    groups = weight.unflatten(1, (4, 32))
    start = grid.range_grid(groups, symmetric=False)  # plain rounding: HQQ's tuning is not this test's matter

    def error(found: grid.Grid, nibbles: Tensor) -> float:
        difference = weight - found.values(nibbles).flatten(1)
        return float(((difference @ hessian) * difference).sum())

    found, nibbles = gptq(weight, curvature(hessian), start)
    assert error(found, nibbles) < 0.7 * error(start, start.nibbles(groups))
    assert (found.values(nibbles).flatten(1)[weight == 0] == 0).all()
    assert torch.equal(found.scale, found.scale.bfloat16().float())
    assert torch.equal(nibbles, nibbles.round().clamp(0, 15))


def test_gptq_on_independent_inputs_is_nearest_rounding() -> None:
    """Nothing can make up for anything then; only the scales move."""
    groups = normal_groups()
    start = fitted_grid(groups, symmetric=True)
    found, nibbles = gptq(groups.flatten(1), curvature(torch.eye(128)), start)
    again = squared_error(groups, start).sum()
    error = (groups - found.values(nibbles)).square().sum()
    assert error <= again * 1.0001
    assert (nibbles == start.nibbles(groups)).float().mean() > 0.9


# Grids that are already there


def on_a_grid(weight: Tensor, *, mirrored: bool = False) -> Tensor:
    """What quantization-aware training leaves in a bfloat16 file: int4 multiples of one scale for 32 neighbours."""
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / 7.5).bfloat16().float()
    low, high = (-7, 8) if mirrored else (-8, 7)
    return ((groups / scale).round().clamp(low, high) * scale).bfloat16().float().flatten(1)


@pytest.mark.parametrize(("mirrored", "zero"), [(False, 8), (True, 7)])
def test_a_grid_is_found_to_the_bit(mirrored: bool, zero: int) -> None:
    weight = on_a_grid(torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * 0.02, mirrored=mirrored)
    weight[3, 32:64] = 0
    groups = weight.unflatten(1, (-1, 32))
    found, fits = grid.exact_grid(groups)
    reached = (groups / found.scale[..., None]).round().abs().amax(dim=-1) == 8
    assert fits.all()
    assert (found.zero[reached] == zero).all()
    assert torch.equal(found.values(found.nibbles(groups)).bfloat16().float(), groups)


def test_no_grid_is_seen_in_weights_that_have_none() -> None:
    weight = torch.randn(512, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert not grid.exact_grid(weight)[1].any()


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantization_aware_checkpoint_keeps_its_weights_exactly(method: str, symmetric: bool) -> None:
    """Google's QAT checkpoints are bfloat16 files on a symmetric int4 grid of 32: quantizing them must lose nothing."""
    model = small_text_model()
    rules = calibrated({"format": "int4", "method": method, "symmetric": symmetric})
    drawn = plan(model, rules)
    weights = {
        name: weight
        for name, weight in planned_weights(model, drawn.quantized()).items()
        if isinstance(drawn[name].format, Int4)
    }
    for weight in weights.values():
        weight.data = on_a_grid(weight.detach())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    quantize_(model, drawn, data=CalibrationData(samples(), Store()))
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Int4Linear)
        assert torch.equal(layer.dequantize().bfloat16().float(), weight), name


# In a model


@pytest.mark.parametrize("options", [{"method": "hqq"}, {"method": "gptq"}, {"method": "hqq", "symmetric": True}], ids=str)
def test_pruned_zeros_stay_zeros(options: dict[str, object]) -> None:
    model = small_text_model()
    rules = calibrated({"format": "int4", **options}, {"method": "magnitude", "ratio": 0.5})
    drawn = pipeline.compress(model, rules, data=CalibrationData(samples(), Store()))
    for layer in inspection.measure(model, drawn):
        if layer.row.is_quantized:
            assert layer.sparsity >= 0.5


def divergence(model: gemma.GemmaModel, reference: gemma.GemmaModel, shown: tuple[Sample, ...]) -> float:
    """Mean KL of the next token, over pictures and answers."""
    total = 0.0
    with torch.inference_mode():
        for sample in shown:
            one, other = (version(**model_inputs(version, sample)).logits.log_softmax(-1) for version in (model, reference))
            total += float((other.exp() * (other - one)).sum(-1).mean())
    return total / len(shown)


def test_gptq_keeps_a_model_closer_than_hqq() -> None:
    rules = Recipe.load("small-int4-gptq", ("calibration.windows=12", "quantization.default.symmetric=true"))
    assert rules.calibration is not None
    drawn = draw_samples(rules.calibration, processing())
    reference, found = fresh_model(), dict[str, float]()
    for method in ("hqq", "gptq"):
        model = fresh_model()
        chosen = Recipe.from_tree(rules.model_dump(mode="json"), "test", (f"quantization.default.method={method}",))
        quantize_(model, plan(model, chosen), data=CalibrationData(drawn[:8], Store()))
        found[method] = divergence(model, reference, drawn[8:])
    assert found["gptq"] < 0.5 * found["hqq"]
