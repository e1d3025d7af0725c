"""What tests share: the bundled model, its processing, and transformers' own generation as the oracle."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from gemma_opt import charts, gemma
from gemma_opt.prompt import EncodedPrompt

BUNDLED = gemma.BUNDLED["small-gemma3"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "chart.png"


@cache
def processing() -> gemma.Processing:
    """The bundled model's tokenizer and processor, shared by all tests."""
    return gemma.load_processing(BUNDLED, gemma.read_config(BUNDLED))


def fresh_model() -> gemma.GemmaModel:
    """The bundled model in float32, newly loaded: a test may change it."""
    return gemma.load_base(gemma.BaseFiles("small-gemma3", BUNDLED), torch.float32, torch.device("cpu")).model


@cache
def shared_model() -> gemma.GemmaModel:
    """The bundled model in float32, for tests that only read it."""
    return fresh_model()


@cache
def placed_model() -> gemma.GemmaModel:
    """The same on a GPU, where there is one. Apart, because to move the shared one would be to move it for every test."""
    return shared_model() if DEVICE.type == "cpu" else fresh_model().to(DEVICE)


def chart(index: int = 0, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """An unseen picture."""
    return charts.draw("test", 11, index, size=size).image


def oracle_inputs(model: gemma.GemmaModel, prompt: EncodedPrompt) -> dict[str, Tensor]:
    """Model inputs for transformers' forward and generate."""
    ids = torch.tensor([prompt.token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        inputs |= {"pixel_values": torch.stack(prompt.images), "token_type_ids": (ids == model.config.image_token_id).long()}
    return inputs


def oracle_tokens(model: gemma.GemmaModel, prompt: EncodedPrompt, count: int) -> list[int]:
    """Exactly `count` greedy tokens of transformers' `generate`."""
    with torch.inference_mode():
        output = model.generate(**oracle_inputs(model, prompt), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return output[0, len(prompt.token_ids) :].tolist()


def allocated_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and of the quantized layers' buffers; RoPE tables and position ids are no weights."""
    own = [buffer for name, buffer in model.named_buffers() if "rotary" not in name and "position_ids" not in name]
    tensors = [*model.parameters(), *(buffer for buffer in own if buffer.ndim)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
