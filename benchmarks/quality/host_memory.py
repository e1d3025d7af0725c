"""Peak host memory of layer-streamed calibration on the true Gemma 3 4B text shape: `host_memory.py [--layers 3]`.

Builds that many decoder layers with random bfloat16 weights and the full embedding table, prunes them with the dearest
options, and adds by arithmetic what the other layers, the vision tower and the rest of the samples would hold. Writes
host_memory.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_opt import checkpoint, pipeline
from gemma_opt.calibration import CalibrationData, Sample, Store
from gemma_opt.recipe import Recipe

FILE = Path(__file__).parent / "host_memory.json"
LAYERS = 34
LAYER_BYTES = 94_371_840 * 2
VISION_BYTES = (417_000_000 + 3_000_000) * 2
HIDDEN = 2560
STAGES = {
    "compact": {"method": "compact", "ratio": 0.25, "match": "dense"},
    "sparsegpt": {"method": "sparsegpt", "ratio": 0.5, "pattern": "2:4", "match": "dense", "refine": 5},
    "admm": {"method": "admm", "ratio": 0.5, "pattern": "2:4", "steps": 2, "refine": 5},
    "admm-block": {"method": "admm", "ratio": 0.5, "pattern": "2:4", "steps": 2, "refine": 5, "block_epochs": 1},
}


def main() -> None:
    """Prune, and write down the peak."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--stage", choices=STAGES, default="compact")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = _model(arguments.layers)
    loaded = _peak_bytes()
    generator = torch.Generator().manual_seed(0)
    samples = tuple(Sample(torch.randint(10, 200_000, (1, 512), generator=generator)) for _ in range(arguments.windows))
    started = time.monotonic()
    pipeline.compress(model, _recipe(arguments.stage), data=CalibrationData(samples, Store()))
    peak = _peak_bytes()
    rest = (LAYERS - arguments.layers) * LAYER_BYTES + VISION_BYTES
    more_states = 2 * (128 - arguments.windows) * 512 * HIDDEN * 2  # hidden states of both streams, bfloat16
    inputs = (128 - arguments.windows) * 512 * (HIDDEN * 2 + 2048 + 10_240) * 2  # one layer's dense inputs
    outputs = (128 - arguments.windows) * 512 * HIDDEN * 4 if "block_epochs" in STAGES[arguments.stage] else 0  # float32
    result = {
        "stage": STAGES[arguments.stage],
        "layers": arguments.layers,
        "windows": arguments.windows,
        "seconds": round(time.monotonic() - started),
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "computed_for_34_layers_vision_and_128_windows_bytes": peak + rest + more_states + inputs + outputs,
        "versions": checkpoint.versions(),
    }
    known = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    FILE.write_text(json.dumps(known | {arguments.stage: result}, indent=1), "utf-8")
    print(json.dumps(result, indent=1))


def _model(layers: int) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(
        vocab_size=262_208, hidden_size=HIDDEN, intermediate_size=10_240, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, sliding_window=1024, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Gemma3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _recipe(stage: str) -> Recipe:
    tree = {"name": "memory", "model": {"base": "random"}, "calibration": {"source": ["random"]}, "sparsity": [STAGES[stage]]}
    return Recipe.from_tree(tree, "memory")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
