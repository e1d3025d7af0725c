"""What the stages share: the device, models with random weights, results that a later run goes on with, and clocks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.environment import RESULTS, ROOT, describe
from gemma_opt import gemma
from gemma_opt.policy import plan as make_plan
from gemma_opt.quantization.weights import empty_like_plan_
from gemma_opt.recipe import Recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILE_CACHE = ROOT / "build" / "gpu_compile_cache"  # blocks and kernels that one stage made and the next uses


@dataclass
class Results:
    """One stage's figures in a JSON file, written after every entry. An entry that is there is not measured again.

    deadline: seconds of time.monotonic() after which no entry is begun: run the stage again for the rest.
    """

    stage: str
    deadline: float
    folder: Path = RESULTS

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"gpu_{self.stage}.json"

    def measure(self, name: str, run: Callable[[], dict[str, object]]) -> None:
        """Measure one entry, unless it is there for this device already or time has run out."""
        known = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        if known.get(name, {}).get("device") == device_name():
            print(f"{name}: measured before")
            return
        if time.monotonic() > self.deadline:
            print(f"{name}: left for the next run")
            return
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        where = {"device": device_name(), "environment": describe()}  # before anything is measured: what fails here, fails soon
        entry = run()
        print(f"{name}: {json.dumps(entry)}", flush=True)  # before the file is written: GPU time is too dear to lose
        known[name] = {**where, **entry, "stage_seconds": round(time.monotonic() - started, 1)}
        self.path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


def device_name() -> str:
    """The GPU, or that there is none."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def config_of(shape: str) -> gemma.GemmaConfig:
    """A published size, or the bundled model (`small-gemma3`) to try a stage out where there is no GPU."""
    return gemma.read_config(gemma.BUNDLED[shape]) if shape in gemma.BUNDLED else gemma.named_config(shape)


def recipe_of(stored: str) -> Recipe:
    """The 4B recipe of a stored format: int8, int8-dynamic, int4-g32, int4-g128 or bf16, all with bfloat16 activations."""
    small: dict[str, object] = {"vision": "int8", "embedding": "int8"}
    quantizations: dict[str, dict[str, object]] = {
        "bf16": {},
        "int8": {"default": "int8", "roles": small},
        "int8-dynamic": {"default": "int8_dynamic", "roles": small},
        "int4-g32": {"default": {"format": "int4", "group": 32}, "roles": small},
        "int4-g128": {"default": {"format": "int4", "group": 128}, "roles": small},
    }
    base = {"base": "google/gemma-3-4b-it", "revision": "0" * 40}
    return Recipe.from_tree({"name": f"benchmark-{stored}", "model": base, "quantization": quantizations[stored]}, "benchmark")


def random_model(shape: str, stored: str) -> gemma.GemmaModel:
    """A model as a finished checkpoint of that format would load, with random weights that are not zero, on DEVICE."""
    torch.manual_seed(0)
    config, recipe = config_of(shape), recipe_of(stored)
    model = gemma.empty_model(config, gemma.DTYPES[recipe.model.dtype])
    empty_like_plan_(model, make_plan(model, recipe))
    empty = model.state_dict(keep_vars=True)
    model.load_state_dict({name: _random_like(name, empty) for name in empty}, strict=True, assign=True)
    gemma.tie_head_(model)
    nn.Module.to(model, DEVICE)  # the buffers that no checkpoint stores
    model.requires_grad_(False)
    return model.eval()


def _random_like(name: str, empty: dict[str, Tensor]) -> Tensor:
    """Values of the size that keeps activations' size: inputs^-0.5 in matrices, about 0 in norms, which add 1."""
    meta = empty[name]
    module, _, part = name.rpartition(".")
    if not meta.is_meta:
        return meta
    if meta.dtype == torch.int8:
        return torch.randint(-127, 128, meta.shape, dtype=torch.int8, device=DEVICE)
    if meta.dtype == torch.uint8:
        low, high = (7, 10) if part == "weight_zero" else (0, 256)
        return torch.randint(low, high, meta.shape, dtype=torch.uint8, device=DEVICE)
    if part == "weight_scale":
        packed = f"{module}.weight_packed" in empty
        inputs = empty[f"{module}.weight_packed"].shape[1] * 2 if packed else empty[f"{module}.weight"].shape[1]
        return torch.full(meta.shape, inputs**-0.5 / (4.6 if packed else 74), dtype=meta.dtype, device=DEVICE)
    wide = meta.dim() > 1
    values = torch.randn(meta.shape, device=DEVICE) * (meta[0].numel() ** -0.5 if wide else 0.02)
    return values.to(meta.dtype)


def copy_gb_s() -> float:
    """Bandwidth of a device-to-device copy, bytes read plus bytes written."""
    source = torch.randint(-128, 128, (2**30 if DEVICE.type == "cuda" else 2**26,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 20) / 1e9


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of one call with everything it started on the device done; after two calls that warm up."""
    times: list[float] = []
    for turn in range(repeats + 2):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        if turn > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


@dataclass(frozen=True)
class Kernel:
    """One that ran on the GPU; times in microseconds. One that starts early counts its waiting."""

    name: str
    start: float
    end: float


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """What `run` has the GPU do, in the order in which it starts; nothing without one."""
    if DEVICE.type != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize()
    found = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    times = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in found]
    return sorted(times, key=lambda kernel: kernel.start)


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most torch had allocated on the GPU at once since `reset_peak`; 0 without one."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def reset_peak() -> None:
    """Begin a new measurement of `peak_bytes`."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
