"""Quantized inputs: int8 and float8 grids, observers, smoothing, and static scales from calibration to checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from models import fresh_model, processing
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig
from torchao.quantization import quantize_ as torchao_quantize_

from gemma_opt import checkpoint, inspection, loading, pipeline
from gemma_opt.calibration import CalibrationData, Sample, Store, draw_samples, random_samples, walk_layers
from gemma_opt.errors import NeedsBuild, PlanError, RecipeError
from gemma_opt.policy import plan
from gemma_opt.quantization import Fp8Linear, Int8Linear, quantize_
from gemma_opt.quantization.activations import FP8, FP8_MAX, quantize_input
from gemma_opt.quantization.calibrated import observe
from gemma_opt.quantization.observers import Observed
from gemma_opt.quantization.rows import fitted_fp8_rows, fp8_rows, int8_rows
from gemma_opt.quantization.smoothing import smooth_
from gemma_opt.recipe import TEXT_ROLES, Recipe
from gemma_opt.staging import staging

CPU = torch.device("cpu")
STATIC = Recipe.load("small-int8-static", ("calibration.windows=8",))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def samples(count: int = 4) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(Sample(torch.randint(4, 2000, (1, 96), generator=generator)) for _ in range(count))


# Grids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_int8_gives_every_token_its_whole_range(dtype: torch.dtype) -> None:
    x = (rand(2, 5, 32) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    x[0, 0] = 0
    steps, scale = quantize_input(x, "int8_dynamic", None)
    assert scale is not None
    assert (steps.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (2, 5, 1))
    assert torch.equal(steps, steps.round())
    assert (steps.abs().amax(dim=-1) == 127).sum() == 9
    assert ((steps * scale - x).abs() <= scale * 0.5001).all()
    assert (steps[0, 0] == 0).all()


def test_fp8_takes_the_nearest_value_of_the_format() -> None:
    """Against a search through all 256 codes of e4m3."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()].unique()
    assert codes.max() == FP8_MAX
    x = torch.cat((rand(2000) * 100, codes, torch.tensor([500.0, -1e9])))
    steps, _ = quantize_input(x, "fp8_static", torch.tensor(1.0))
    nearest = (x.clamp(-FP8_MAX, FP8_MAX)[:, None] - codes).abs().amin(dim=1)
    assert torch.isin(steps, codes).all()
    assert torch.equal((steps - x.clamp(-FP8_MAX, FP8_MAX)).abs(), nearest)


def test_fp8_rows_reach_the_limit_and_keep_zeros() -> None:
    weight = rand(48, 32) * torch.logspace(-6, 6, 48)[:, None]
    weight[0], weight[:, ::3] = 0, 0
    rows, scale = fp8_rows(weight)
    assert (rows.dtype, scale.dtype) == (FP8, torch.float32)
    assert (rows.float().abs().amax(dim=1)[1:] == FP8_MAX).all()
    assert (rows.float()[weight == 0] == 0).all()
    assert ((rows.float() * scale[:, None] - weight).abs() <= weight.abs() * 2**-4 + scale[:, None] * 2**-10).all()


def test_fitted_fp8_rows_cost_less_where_it_counts() -> None:
    weight, importance = rand(48, 32) * torch.logspace(-6, 6, 48)[:, None], torch.rand(32) ** 4
    weight[0], weight[:, ::3] = 0, 0

    def costs(rows: Tensor, scale: Tensor) -> Tensor:
        return (rows.float() * scale[:, None] - weight).square() @ importance

    plain, fitted = fp8_rows(weight), fitted_fp8_rows(weight, importance)
    assert (costs(*fitted) <= costs(*plain)).all()
    assert (costs(*fitted) / costs(*plain))[1:].mean() < 0.9
    assert (fitted[0].float()[weight == 0] == 0).all()


def test_fp8_rows_are_torchaos() -> None:
    linear = nn.Linear(64, 48, bias=False)
    rows, scale = fp8_rows(linear.weight.detach())
    torchao_quantize_(linear, Float8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(rows.float(), linear.weight.qdata.float())
    assert torch.equal(scale, linear.weight.scale.flatten())


def test_dynamic_int8_is_what_torchao_computes() -> None:
    linear, x = nn.Linear(64, 48), rand(7, 64, seed=1)
    rows, scale = int8_rows(linear.weight.detach())
    ours = Int8Linear(rows, scale, linear.bias.detach(), "int8_dynamic")
    torchao_quantize_(linear, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    with torch.inference_mode():
        difference, size = (linear(x) - ours(x)).norm(), ours(x).norm()
    assert difference < 0.01 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["int8_dynamic", "int8_static", "fp8_dynamic", "fp8_static"])
def test_a_product_is_that_of_the_dequantized_input_and_weight(activation: str, dtype: torch.dtype) -> None:
    weight, x, bias = rand(48, 32), rand(2, 3, 32, seed=1).to(dtype), rand(48, seed=2).to(dtype)
    static = torch.tensor(0.02) if activation.endswith("static") else None
    made = (
        Int8Linear(*int8_rows(weight), bias, activation, static)
        if activation.startswith("int8")
        else Fp8Linear(*fp8_rows(weight), bias, activation, static)
    )
    steps, scale = quantize_input(x, activation, static)
    assert scale is not None
    wanted = functional.linear(steps.double() * scale, made.dequantize().double(), bias.double())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert made(x).dtype == dtype
    torch.testing.assert_close(made(x).double(), wanted, rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, fullgraph=True, backend="eager")(x), made(x))
    assert f"activation={activation}" in repr(made)


# Observers


def observed(x: Tensor) -> Observed:
    seen = Observed()
    for part in x.split(100):
        seen.add(part)
    return seen


def test_observers_on_inputs_with_an_outlier() -> None:
    x = rand(1000, 64)
    x[17, 3] = 200.0
    seen = observed(x)
    assert seen.channels is not None
    assert torch.equal(seen.channels, x.abs().amax(dim=0))
    assert seen.reach("absmax", "int8_static") == 200.0
    assert seen.reach("percentile", "int8_static") == pytest.approx(float(x.abs().flatten().quantile(0.9999)), rel=0.15)

    def error(reach: float) -> float:
        steps, _ = quantize_input(x, "int8_static", torch.tensor(reach / 127))
        return float((steps * reach / 127 - x).square().sum())

    best = min(error(200.0 * 2 ** -(power / 40)) for power in range(240))
    assert error(seen.reach("mse", "int8_static")) <= 1.02 * best


def test_an_input_that_is_always_zero_has_a_usable_scale() -> None:
    assert float(observed(torch.zeros(10, 8)).scale("mse", "int8_static")) > 0


# Smoothing


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothing_evens_inputs_out_and_changes_nothing_else(alpha: float) -> None:
    model, ids = fresh_model(), torch.randint(4, 2000, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        before = model(ids).logits
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    for block in walk_layers(model, samples()):
        steps = block.steps([name for name in linears if name.startswith(block.name)])
        assert len(steps) == 4
        first = observe(block, [names[0] for names in steps])
        for names in reversed(steps):
            peaks = first[names[0]].channels
            assert peaks is not None
            smooth_(block.layer, {name: model.get_submodule(name) for name in names}, peaks, alpha)
        after = observe(block, [names[0] for names in steps])
        gains = [unevenness(after[name]) / unevenness(first[name]) for name in after]
        assert max(gains) < 1.05
        assert math.prod(gains) < 0.8
        block.advance()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)


def unevenness(seen: Observed) -> float:
    assert seen.channels is not None
    return float(seen.channels.max() / seen.channels.median())


def test_smoothing_of_bfloat16_norms_uses_the_factor_that_rounding_leaves() -> None:
    """1 + weight near zero rounds by percents in bfloat16; the columns must take the factor really applied."""
    from gemma_opt.quantization.smoothing import _divide_norm_

    norm = nn.Module()
    norm.weight = nn.Parameter(torch.tensor([-0.96, 0.5, 3.0, -0.25]).bfloat16())
    before = 1 + norm.weight.detach().float()
    with torch.no_grad():
        applied = _divide_norm_(norm, torch.tensor([1.7, 0.3, 40.0, 1.0]))
    torch.testing.assert_close((1 + norm.weight.detach().float()) * applied, before)


# Static scales, from calibration to checkpoint


def build(recipe: Recipe, folder: Path, store: Store | None = None) -> None:
    model, assert_recipe = fresh_model(), recipe.calibration
    assert assert_recipe is not None
    data = CalibrationData(draw_samples(assert_recipe, processing()), store or Store())
    layers = inspection.measure(model, pipeline.compress(model, recipe, data=data))
    with staging(folder, 0) as staged:
        checkpoint.write(staged, model, processing(), recipe, layers, {"name": "small-gemma3"})


@pytest.fixture(scope="module")
def static_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("static") / "out"
    build(STATIC, folder)
    return folder


def test_calibrated_scales_are_stored_shown_and_loaded_without_data(static_folder: Path) -> None:
    ready = loading.open_model(loading.Source(STATIC, static_folder), "cpu")
    shown = {layer.row.name: layer for layer in inspection.measure(ready.model, ready.plan)}
    text = [layer for layer in shown.values() if layer.row.role in TEXT_ROLES]
    assert len(text) == 4 * 7
    assert all(layer.input_scale and layer.input_scale > 0 for layer in text)  # attention inputs and outputs included
    tensors = load_file(static_folder / "model-00001-of-00001.safetensors")
    for layer in text:
        stored = tensors[f"{layer.row.name}.input_scale"]
        assert (stored.dtype, stored.shape) == (torch.float32, ())
        assert float(stored) == layer.input_scale
    queries, keys = (shown[f"model.language_model.layers.0.self_attn.{name}_proj"].input_scale for name in "qk")
    assert queries == keys  # one input, one scale
    manifest = {str(row["name"]): row["measured"] for row in checkpoint.read_manifest(static_folder).plan}
    assert manifest[text[0].row.name]["input_scale"] == text[0].input_scale
    assert sum(tensor.nbytes for tensor in tensors.values()) == ready.plan.bytes


def test_an_interrupted_calibration_goes_on_and_ends_the_same(static_folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "work")

    class Killed(Exception):
        """Power went away."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and (tmp_path / "work").is_dir() and len(list((tmp_path / "work").glob("*.safetensors"))) == 2:
            raise Killed

    section = STATIC.calibration
    assert section is not None
    data = CalibrationData(draw_samples(section, processing()), store)
    with pytest.raises(Killed):
        pipeline.compress(fresh_model(), STATIC, stop, data)
    build(STATIC, tmp_path / "out", store)
    one, other = (load_file(folder / "model-00001-of-00001.safetensors") for folder in (static_folder, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_scales_need_data_and_say_so() -> None:
    with pytest.raises(RecipeError, match="int8_static need data: add a section `calibration"):
        Recipe.load("small-int8", ("quantization.default=int8_static",))
    with pytest.raises(NeedsBuild):
        loading.open_model(loading.Source(STATIC), "cpu")
    with pytest.raises(RecipeError, match=r"roles\.vision: int8_static measures its inputs, .* text layers only"):
        Recipe.load("small-int8-static", ("quantization.roles.vision=int8_static",))
    model = fresh_model()
    with pytest.raises(PlanError, match="int8_static needs calibration data, and the pipeline was given none"):
        quantize_(model, plan(model, STATIC))


@pytest.mark.parametrize("stored", ["int8_dynamic", "fp8_dynamic", "int4", "int8_dynamic_int4"])
def test_formats_that_only_measure_take_random_tokens_where_there_is_no_data(stored: str) -> None:
    """And the recipe's calibration data where there is some."""
    config = fresh_model().config
    tokens = random_samples(config.get_text_config().vocab_size, 2, config.image_token_id)
    recipe = Recipe.load("small-bf16", (f"quantization.default={stored}",))
    calibrated = Recipe.from_tree(recipe.model_dump(mode="json") | {"calibration": {"source": ["charts"]}}, "test")
    assert not recipe.needs_data
    assert calibrated.needs_data
    assert calibrated.digest() != recipe.digest()
    found: list[dict[str, Tensor]] = []
    for data in (None, CalibrationData(tokens, Store()), CalibrationData(samples(), Store())):
        model = fresh_model()
        quantize_(model, plan(model, recipe), data=data)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    assert not all(torch.equal(found[0][name], tensor) for name, tensor in found[2].items())


def test_fp8_on_the_cpu_says_that_it_is_emulated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gemma_opt"):
        ready = loading.open_model(loading.Source(Recipe.load("small-fp8")), "cpu")
    assert "fp8_dynamic on the CPU is emulated" in caplog.text
    assert "emulated" in repr(ready.model.get_decoder().layers[0].mlp.up_proj)


FORMATS = ("int8-dynamic", "fp8", "fp8-static", "int4-gptq", "mobile")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_saved_and_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(f"small-{name}", ("calibration={source: [charts], windows: 4}",))
    build(recipe, tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out", CPU)
    stored = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    again = checkpoint.stored_tensors(loaded.model, loaded.plan)
    assert stored.keys() == again.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == again[key].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), again[key].reshape(-1).view(torch.uint8)), key
    assert sum(tensor.nbytes for tensor in stored.values()) == loaded.plan.bytes
