"""Pictures → soft tokens: transformers' vision tower and projector, and the latest results kept by content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gemma_opt.engine.graphs import Recorder
from gemma_opt.gemma import GemmaModel, picture_tokens, weights_device

CACHE_BYTES = 32 * 2**20  # 25 pictures of the 4B model in bfloat16

Encode = Callable[[Tensor], Tensor]
"""[3, side, side] float32 → soft tokens [tokens, hidden]."""


class PictureCache:
    """Encodes one picture at a time, so that its soft tokens do not depend on what else was asked.

    encode: the model's `picture_encoder`. The least recently used results are dropped beyond CACHE_BYTES.
    """

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0
        self.encoded = 0

    def soft_tokens(self, key: bytes, pixels: Tensor) -> Tensor:
        """Soft tokens [tokens, hidden] of a picture. key: a digest of its pixels."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        found = self._encode(pixels)
        self.encoded += 1
        self._kept[key] = found
        self._bytes += found.nbytes
        while self._bytes > CACHE_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def picture_encoder(model: GemmaModel, recorder: Recorder | None = None) -> Encode:
    """The vision tower and projector of a model that sees. recorder: records them for pictures of the model's own size."""
    find_features = cast(Callable[[Tensor], BaseModelOutputWithPooling], model.get_image_features)
    device, dtype = weights_device(model), model.dtype

    def features(batch: Tensor) -> Tensor:
        return cast(Tensor, find_features(batch).pooler_output)[0].to(dtype)

    def encode(pixels: Tensor) -> Tensor:
        return features(pixels[None].to(device).to(dtype))

    if recorder is None:
        return encode
    config = model.config
    side = int(getattr(config, "vision_config").image_size)  # noqa: B009 text models have none
    batch = torch.zeros(1, 3, side, side, dtype=dtype, device=device)
    sizes = picture_tokens(config), config.get_text_config().hidden_size
    soft_tokens = torch.zeros(sizes, dtype=dtype, device=device)

    def run() -> None:
        soft_tokens.copy_(features(batch))

    replay = recorder.record(run)

    def encode_recorded(pixels: Tensor) -> Tensor:
        if pixels.shape != batch.shape[1:]:
            return encode(pixels)
        batch.copy_(pixels[None].to(device))  # converted there
        replay()
        return soft_tokens.clone()

    return encode_recorded
