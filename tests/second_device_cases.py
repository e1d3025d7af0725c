"""Compression where the model is not on the CPU: on a second device that every machine has. Run by `test_devices`.

SparseGPT and compact removal kept masks and counts on the CPU and ended with "expected all tensors to be on the same device"
on every GPU; a build that went on after an interruption put the CPU's tensors into the GPU's model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from second_device import Elsewhere, second_device
from torch import Tensor

from gemma_opt import pipeline
from gemma_opt.calibration import CalibrationData, Sample, Store
from gemma_opt.distill import DistillData
from gemma_opt.gemma import GemmaModel, tie_head_
from gemma_opt.quantization import fit, grid
from gemma_opt.quantization.gptq import curvature, gptq
from gemma_opt.recipe import Recipe
from gemma_opt.sparsity import masks, quadratic, structured
from gemma_opt.sparsity.sparsegpt import sparsegpt
from tests.shapes import small_text_model

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*")

SPARSITY: dict[str, list[dict[str, object]]] = {
    "wanda": [{"method": "wanda", "ratio": 0.5}],
    "wanda by sensitivity": [{"method": "wanda", "ratio": 0.5, "pattern": "per_layer", "allocation": "sensitivity"}],
    "wanda 2:4": [{"method": "wanda", "ratio": 0.5, "pattern": "2:4"}],
    "sparsegpt": [{"method": "sparsegpt", "ratio": 0.5}],
    "sparsegpt by row": [{"method": "sparsegpt", "ratio": 0.5, "pattern": "per_row"}],
    "sparsegpt 2:4, refined": [{"method": "sparsegpt", "ratio": 0.5, "pattern": "2:4", "refine": 3, "match": "dense"}],
    "admm 2:4": [{"method": "admm", "ratio": 0.5, "pattern": "2:4", "steps": 3, "refine": 3}],
    "admm 2:4, block-wise": [{"method": "admm", "ratio": 0.5, "pattern": "2:4", "steps": 3, "block_epochs": 1}],
    "admm by sensitivity": [{"method": "admm", "ratio": 0.5, "allocation": "sensitivity", "steps": 3}],
    "sparsegpt by sensitivity": [{"method": "sparsegpt", "ratio": 0.5, "allocation": "sensitivity", "order": "one_shot"}],
    "compact": [{"method": "compact", "ratio": 0.25, "multiple": 4, "match": "dense"}],
    "compact, block-wise": [{"method": "compact", "ratio": 0.25, "multiple": 4, "block_epochs": 1}],
    "compact, not refitted": [{"method": "compact", "ratio": 0.25, "multiple": 4, "compensate": False}],
    "compact, then global": [
        {"method": "compact", "ratio": 0.25, "multiple": 4},
        {"method": "magnitude", "ratio": 0.3, "pattern": "global"},
    ],
    "layer norm": [{"method": "layer_norm", "ratio": 0.3}],
}
FORMATS: dict[str, object] = {
    "int8": "int8",
    "int8_dynamic": "int8_dynamic",
    "int8_static": "int8_static",
    "int8_static, percentile": {"format": "int8_static", "observer": "percentile"},
    "fp8": "fp8",
    "fp8_dynamic": "fp8_dynamic",
    "fp8_static": "fp8_static",
    "int4": {"format": "int4", "group": 32},
    "int4, gptq": {"format": "int4", "group": 32, "method": "gptq", "symmetric": True},
    "int8_dynamic_int4": {"format": "int8_dynamic_int4", "group": 32, "smooth": None},
}
TRAININGS: dict[str, dict[str, object]] = {
    "kept teacher": {"top_k": 16},
    "part of the vocabulary": {"top_k": 16, "negatives": 32, "roles": ["up", "embedding"]},
    "running teacher": {"top_k": 0, "hidden": 0.5},
    "behind the rounding": {"top_k": 16, "quantized": True},
}
RECIPES: dict[str, dict[str, object]] = {
    **{name: {"sparsity": stages} for name, stages in SPARSITY.items()},
    **{name: {"quantization": {"default": stored, "roles": {"embedding": "int8"}}} for name, stored in FORMATS.items()},
    "low rank": {"lowrank": {"roles": ["up", "down"], "ratio": 0.3, "multiple": 1}},
    "low rank by energy": {"lowrank": {"roles": ["up"], "energy": 0.5, "multiple": 1, "whiten": False}},
}


def recipe(sections: dict[str, object]) -> Recipe:
    """float32, its floats stored as they are."""
    exact = {"default": "fp32", "roles": {"embedding": "fp32"}}
    tree = {
        "name": "test",
        "model": {"base": "small-gemma3", "dtype": "float32"},
        "calibration": {"source": ["charts"], "windows": 4, "window_tokens": 128},
        "quantization": exact,
    }
    return Recipe.from_tree(tree | sections, "test")


def training(section: dict[str, object]) -> Recipe:
    pruning = [{"method": "magnitude", "ratio": 0.3}]
    common = {"data": ["unused"], "steps": 3, "batch": 4, "micro_batch": 2, "precision": "float32"}
    stored = {"default": "int8"} if section.get("quantized") else {"default": "fp32", "roles": {"embedding": "fp32"}}
    return recipe({"sparsity": pruning, "distill": common | section, "quantization": stored})


def samples(count: int = 4) -> tuple[Sample, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(Sample(torch.randint(3, 128, (1, 40 + number), generator=generator)) for number in range(count))


def wide_model() -> GemmaModel:
    """Random weights; every input divides into int4 groups."""
    return small_text_model(intermediate=64)


def compressed(chosen: Recipe, device: torch.device, store: Store) -> dict[str, Tensor]:
    """The state of a model that was compressed there."""
    model = wide_model().to(device)
    tie_head_(model)  # a tensor of the second device is a new one, for every name
    model.set_attn_implementation("eager")  # torch's own picks its kernel by the device's name
    given = DistillData(samples(), store.section("d"), save_every_s=0) if chosen.distill else None
    pipeline.compress(model, chosen, data=CalibrationData(samples(), store), distill_data=given)
    return model.state_dict()


@pytest.mark.parametrize("name", [*RECIPES, *TRAININGS])
def test_a_whole_compression_stays_on_the_models_device(name: str, tmp_path: Path) -> None:
    """And gives the zeros and shapes that the CPU gives; what a store of the same folder has finished goes on there."""
    chosen = training(TRAININGS[name]) if name in TRAININGS else recipe(RECIPES[name])
    expected = compressed(chosen, torch.device("cpu"), Store())
    with second_device() as device:
        for _ in ("first", "resumed"):
            found = compressed(chosen, device, Store(tmp_path / "work"))
            assert [key for key, tensor in found.items() if not isinstance(tensor, Elsewhere)] == []
            assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
            zeros = {key: (int((tensor == 0).sum()), int((expected[key] == 0).sum())) for key, tensor in found.items()}
            assert chosen.quantization.default.format != "fp32" or all(one == other for one, other in zeros.values())


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    with second_device() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        for wrong in (lambda: there + here, lambda: there.masked_fill(here > 0, 0), lambda: here.add_(there[0])):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a scalar of the CPU goes anywhere
        assert there[torch.tensor([0, 2])].tolist() == [1, 1]  # indices of the CPU do
        assert (there.cpu() + here).device.type == "cpu"


def test_the_pure_functions_stay_on_their_inputs_device() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 64, generator=generator), torch.randn(8, 64, generator=generator)
    with second_device() as device:
        moments, weight = (x.T @ x / 200).to(device), weight.to(device)
        problem = quadratic.damped(moments, 0.01)
        kept = structured.choose_channels(weight, problem, 48)
        found = [kept, structured.refit(weight, problem, kept), masks.n_m(weight, 2, 4)]
        found += [sparsegpt(weight, problem, pattern, 100) for pattern in ("per_layer", (2, 4))]
        found += [sparsegpt(weight, problem, "per_row", 32, torch.ones(8, device=device))]
        start = fit.fitted_grid(grid.grouped(weight, 32), symmetric=False, importance=torch.ones(2, 32, device=device))
        finished, nibbles = gptq(weight, curvature(moments), start)
        found += [start.scale, finished.scale, nibbles]
        assert all(isinstance(tensor, Elsewhere) for tensor in found)
