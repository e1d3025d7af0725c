"""Models that are not on the CPU: on a second device, which every machine has, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import fresh_model, processing
from second_device_cases import RECIPES, recipe

from gemma_opt import pipeline
from gemma_opt.calibration import CalibrationData, Store, draw_samples
from gemma_opt.recipe import Calibration


@pytest.mark.parametrize("name", ["cases", "engine"])
def test_all_work_stays_on_the_models_device(name: str) -> None:
    """In a process of its own: torch must know a device before the first backward pass, and other tests make those."""
    cases = Path(__file__).with_name(f"second_device_{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(
        command, cwd=cases.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RECIPES)
def test_the_small_model_is_compressed_on_a_gpu(name: str, tmp_path: Path) -> None:
    """By every recipe, twice: the second time from what the first one's store holds."""
    sections = dict(RECIPES[name])
    chosen, device = recipe(sections), torch.device("cuda")
    section = chosen.calibration
    assert isinstance(section, Calibration)
    drawn = draw_samples(section, processing())
    for _ in ("first", "resumed"):
        model = fresh_model().to(device)
        pipeline.compress(model, chosen, data=CalibrationData(drawn, Store(tmp_path / "work")))
        state = model.state_dict()
        assert [key for key, tensor in state.items() if not tensor.is_cuda] == []
        assert all(bool(tensor.float().isfinite().all()) for tensor in state.values())
