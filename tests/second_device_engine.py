"""The engine where the model is not on the CPU: on a second device that every machine has. Run by `test_devices`.

Recordings are functions there, and each refuses what a CUDA graph could not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
import torch
from second_device import Elsewhere, second_device
from second_device_cases import FORMATS, recipe, samples, wide_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from gemma_opt import pipeline
from gemma_opt.calibration import CalibrationData, Store
from gemma_opt.engine.batch import Batch
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import RecordedSteps, Recorder
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.kernels.gpu import find_samplers
from gemma_opt.engine.kernels.triton_matrices import arrange
from gemma_opt.engine.weights import take_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*")

SAMPLINGS = (
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=1.0, top_k=300, min_new_tokens=3, seed=4),
    SamplingParams(temperature=1.0, top_k=0, seed=5),
)
ASKS_THE_HOST = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2"}
_Result = TypeVar("_Result")


class Capture(TorchDispatchMode):
    """Refuses operations that look at values, or at tensors of the CPU."""

    def __torch_dispatch__(self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None):
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:2])
        if by_mask or name in ASKS_THE_HOST or not all(isinstance(tensor, Elsewhere) for tensor in tensors):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return func(*args, **(kwargs or {}))


class Captures(Recorder):
    """Records nothing, and runs each function as a capture would."""

    def record(self, run: Callable[[], _Result]) -> Callable[[], _Result]:
        def replay() -> _Result:
            with Capture():
                return run()

        return replay


def tokens_on(device: torch.device, recorder: Recorder, stored: object) -> list[list[int]]:
    """A prompt for each sampling, a picture in it, then steps of some of them."""
    model = wide_model()
    formats = {"quantization": {"default": stored, "roles": {"embedding": "int8"}}}
    pipeline.compress(model, recipe(formats), data=CalibrationData(samples(), Store()))
    weights = take_weights(model.to(device), release=False, arrange=arrange)
    text = TextModel(weights, KvCache(weights, slots=len(SAMPLINGS), context=64), use_kernels=False)
    batch = Batch(len(SAMPLINGS), weights.shape.vocabulary, [1, 106], device)
    steps = RecordedSteps(text.decode, batch, recorder, find_samplers(batch))
    for slot, sampling in enumerate(SAMPLINGS):
        prompt = [2, *range(40 + slot, 46 + 2 * slot)]
        batch.start(slot, sampling, prompt)
        text.prefill(slot, text.embed(torch.tensor(prompt, device=device)), 0, [(2, 5)])
        batch.feed(*(torch.tensor([value], device=device) for value in (slot, 77, len(prompt))))
    return [steps(slots)() for slots in ([1], [0, 1], [2, 0, 1], [3, 1, 2, 0])]


@pytest.mark.parametrize("name", ["int8", "int8_static", "fp8_dynamic", "int4", "int8_dynamic_int4"])
@torch.no_grad()
def test_recordings_ask_the_host_nothing_and_give_the_cpus_tokens(name: str) -> None:
    expected = tokens_on(torch.device("cpu"), Recorder(torch.device("cpu")), FORMATS[name])
    with second_device() as device:
        assert tokens_on(device, Captures(device), FORMATS[name]) == expected


def test_a_capture_refuses_what_a_cuda_graph_cannot_hold() -> None:
    with second_device() as device:
        there, here = torch.arange(3, device=device), torch.ones(3)
        for wrong in (lambda: there[0].item(), lambda: there[there > 1], lambda: there.copy_(here), there.nonzero):
            with Capture(), pytest.raises(RuntimeError, match="capturing"):
                wrong()
        with Capture():
            assert isinstance(there + 1, Elsewhere)
