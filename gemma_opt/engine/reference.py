"""The reference engine: transformers' own modules, one token at a time, one request at a time.

It defines what is right: its greedy tokens are those of `model.generate`, and every faster engine is compared with it.
Only the hot submodules a recipe names are compiled. For `decode` the KV cache is static, so that a step has one shape.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache, DynamicCache, StaticCache

from gemma_opt.engine.batch import Batch
from gemma_opt.engine.compilation import CompileReport, SelectiveCompiler
from gemma_opt.engine.interface import EngineRequest, FinishReason
from gemma_opt.engine.queueing import OUT_OF_MEMORY, EngineThread, HeldGeneration, QueuedGeneration, warm_up
from gemma_opt.errors import CompileError, EngineError
from gemma_opt.gemma import GemmaModel, stop_token_ids, weights_device
from gemma_opt.recipe import Compile, EngineSection

log = logging.getLogger(__name__)


class ReferenceEngine:
    """An `Engine` over a transformers model.

    load: builds the model; called on the engine's thread, which keeps it. See `EngineThread` for failures.
    warm_up_request: a request that is answered before the constructor returns, without a time limit: it pays for compilation.
    """

    def __init__(
        self,
        load: Callable[[], GemmaModel],
        settings: EngineSection,
        compile_section: Compile,
        warm_up_request: Callable[[], EngineRequest] | None = None,
    ) -> None:
        self._compiler = SelectiveCompiler(compile_section)

        def start() -> _Server:
            server = _Server(load(), settings.context, self._compiler)
            if warm_up_request:
                warm_up(server, warm_up_request())
            return server

        self._thread = EngineThread(start, settings)

    def submit(self, request: EngineRequest) -> HeldGeneration:
        """Queue a request. Raises PromptTooLong, QueueFull, EngineClosed."""
        return self._thread.submit(request)

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._thread.alive

    @property
    def compile_report(self) -> CompileReport:
        """What torch.compile did until now."""
        return self._compiler.report()

    def close(self) -> None:
        """Stop serving."""
        self._thread.close()


class _Server:
    """Serves one generation after another, a whole one each turn. Lives on the engine's thread."""

    def __init__(self, model: GemmaModel, context: int, compiler: SelectiveCompiler) -> None:
        compiler.compile_modules_(model)
        self.model: nn.Module = model
        self.dtype = model.dtype
        self.decode_step = compiler.compile_step(self._forward)
        self.context = context
        self.stop_ids = stop_token_ids(model)
        self.device = weights_device(model)
        self.text_config = model.config.get_text_config()
        self.image_token_id = getattr(model.config, "image_token_id", None)
        # A compiled step needs one shape at every position: a cache that is as long from the start as it can get.
        static = "decode" in compiler.section.targets
        self.static_cache = StaticCache(config=self.text_config, max_cache_len=context) if static else None
        self._waiting: deque[QueuedGeneration] = deque()

    def add(self, generation: QueuedGeneration) -> None:
        """Put a request at the end of the line."""
        self._waiting.append(generation)

    @torch.inference_mode()
    def turn(self) -> bool:
        """Serve who waits longest: prefill, then decode until a stop token, the length limit, a cancel or the deadline."""
        generation = self._waiting.popleft()
        try:
            if reason := None if generation.must_stop else self._generate(generation):
                generation.end(reason)
            else:
                generation.end_early()
        except torch.OutOfMemoryError:
            generation.end(error=EngineError(OUT_OF_MEMORY))
        except TorchDynamoException as error:
            log.error("compilation failed", exc_info=error)
            generation.end(error=CompileError("a compile target of the recipe could not be compiled; the log has the reason"))
        return bool(self._waiting)

    def _generate(self, generation: QueuedGeneration) -> FinishReason | None:
        """How it ended; None: it must stop."""
        request, sampling = generation.request, generation.request.sampling
        position = len(request.token_ids)
        limit = min(sampling.max_new_tokens, self.context - position)
        cache = self._empty_cache()
        batch = Batch(1, self.text_config.vocab_size, self.stop_ids, self.device)
        batch.start(0, sampling, request.token_ids)
        slot = torch.tensor([0], device=self.device)
        logits = self._prefill(request, cache)
        for count in range(limit):
            if generation.must_stop:
                return None
            token = batch.draw_apart(logits.float()[None], [0], torch.tensor([position], device=self.device))
            token_id = int(token)
            if token_id in self.stop_ids:
                return "stop"
            generation.push(token_id)
            batch.feed(slot, token, torch.tensor([position], device=self.device))
            if count + 1 < limit:
                logits = self._decode_one(token, position, cache)
                position += 1
        return "length"

    def _empty_cache(self) -> Cache:
        if self.static_cache is None:
            return DynamicCache(config=self.text_config)
        self.static_cache.reset()
        return self.static_cache

    def _prefill(self, request: EngineRequest, cache: Cache) -> Tensor:
        """Logits [vocabulary] after the prompt."""
        ids = torch.tensor([request.token_ids], device=self.device)
        inputs: dict[str, Tensor] = {"position_ids": torch.arange(ids.shape[1], device=self.device)[None]}
        if request.images:
            inputs["pixel_values"] = torch.stack(request.images).to(self.device, self.dtype)
            inputs["token_type_ids"] = (ids == self.image_token_id).long()
        return self.model(ids, past_key_values=cache, logits_to_keep=1, use_cache=True, **inputs).logits[0, -1]

    def _decode_one(self, token: Tensor, position: int, cache: Cache) -> Tensor:
        """Logits [vocabulary] after one more token at `position`."""
        return self.decode_step(token.view(1, 1), torch.full((1, 1), position, device=self.device), cache)

    def _forward(self, ids: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        return self.model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0, -1]
