"""The engine's thread at work: requests, cache, model, one turn after another.

A turn: drop what must stop, give free slots to who waits, read at most one chunk of one prompt, decode one step of all
slots, hand out the tokens. The scheduler decides who is in a turn and holds no tensors; the forward knows no requests. A
reply is the same whatever runs beside it: prompts are cut by their own content, rows do not see each other, random numbers
depend on seed and position.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from gemma_opt.engine.batch import Batch
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.compilation import SelectiveCompiler
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import Recorder, Tokens, prefill_of, row_counts, steps_of
from gemma_opt.engine.interface import EngineRequest, FinishReason
from gemma_opt.engine.kernels import arrangement
from gemma_opt.engine.kernels.gpu import speed_up_tower_
from gemma_opt.engine.lookup import PromptLookup
from gemma_opt.engine.pictures import Encode, PictureCache, picture_encoder
from gemma_opt.engine.prefixes import Cut, Prefixes, cuts_of
from gemma_opt.engine.queueing import OUT_OF_MEMORY, QueuedGeneration
from gemma_opt.engine.scheduler import Chunk, Scheduler, Span, chunk_ends
from gemma_opt.engine.weights import take_weights
from gemma_opt.errors import CompileError, EngineError, GemmaOptError, InputError
from gemma_opt.gemma import GemmaModel, picture_tokens, stop_token_ids, vision_tower, weights_device
from gemma_opt.recipe import EngineSection

log = logging.getLogger(__name__)

COST_ROUNDS = 5  # timings of which the best counts


@dataclass
class Counters:
    """What the engine did since it started. Read them from any thread."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0  # of prompts, found in a slot's cache
    pictures_encoded: int = 0
    steps: int = 0
    decoded_tokens: int = 0
    guessed_tokens: int = 0
    right_guesses: int = 0


@dataclass(eq=False)
class _Reply:
    """A request on its way through the engine. position: where `last`, the newest token, belongs; it is not in the cache."""

    generation: QueuedGeneration
    image_spans: list[Span]
    cuts: dict[int, Cut]
    limit: int
    lookup: PromptLookup | None
    given: int = 0
    last: int = 0
    position: int = 0
    slot: int = -1

    @property
    def request(self) -> EngineRequest:
        return self.generation.request

    @property
    def left(self) -> int:
        """Tokens it may still get."""
        return self.limit - self.given


@dataclass(frozen=True)
class _Step:
    """A decode step under way."""

    replies: tuple[_Reply, ...]
    tokens: Tokens


class Runner:
    """The engine's thread's side: model, cache and everything that is running. See above for a turn."""

    @torch.inference_mode()
    def __init__(
        self,
        model: GemmaModel,
        settings: EngineSection,
        compiler: SelectiveCompiler,
        counters: Counters,
        *,
        keep_layers: bool,
        compile_cache: Path | None,
        run_ahead: bool | None,
    ) -> None:
        device = weights_device(model)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: Triton and streams know no other
        compiler.compile_modules_(model)
        self._settings, self._counters = settings, counters
        self._stop_ids = stop_token_ids(model)
        self._image_token_id = getattr(model.config, "image_token_id", None)
        recorder = Recorder(device)
        tower = vision_tower(model)
        if tower is not None and "vision" not in compiler.targets:
            speed_up_tower_(tower)
        self._pictures = None if tower is None else PictureCache(_recorded_encoder(model, recorder))
        weights = take_weights(model, release=not keep_layers, arrange=arrangement(device))
        self._device = weights.device
        cache = KvCache(weights, slots=settings.slots, context=settings.context, slack=settings.lookup)
        self._cache = cache
        with recorder.stream():  # kernels warm up there
            self._model = TextModel(weights, cache, compile_cache=compile_cache)
        self._batch = Batch(settings.slots, weights.shape.vocabulary, self._stop_ids, self._device)
        ring = min([layer.length for layer in cache.layers if layer.sliding], default=settings.context)
        self._prefixes = Prefixes(settings.slots, ring, cache.window)
        self._scheduler: Scheduler[QueuedGeneration] = Scheduler(settings.slots)
        self._replies: dict[QueuedGeneration, _Reply] = {}
        self._ahead: _Step | None = None
        wanted = self._device.type == "cuda" if run_ahead is None else run_ahead
        self._runs_ahead = wanted and not settings.lookup  # guesses are made from the tokens
        self._row_cost = self._measure_row_cost() if settings.lookup else 1.0
        longest = max(settings.prefill_chunk, picture_tokens(model.config))  # a picture is never cut
        self._prefill = prefill_of(self._model, longest, recorder)
        self._step, self._first_token = steps_of(self._model.decode, self._batch, recorder)

    # Requests in and out

    def add(self, generation: QueuedGeneration) -> None:
        """Put a request at the end of the line."""
        request = generation.request
        spans = picture_spans(request.token_ids, self._image_token_id)
        if len(spans) != len(request.images):
            generation.end(error=InputError(f"{len(request.images)} pictures, and places for {len(spans)} in the prompt"))
            return
        length, sampling = len(request.token_ids), request.sampling
        ends = chunk_ends(length, spans, self._settings.prefill_chunk)
        cuts = cuts_of(request.token_ids, spans, request.image_keys, ends)
        guesses = self._settings.lookup and sampling.repetition_penalty == 1  # its penalties would depend on the guesses
        self._replies[generation] = _Reply(
            generation=generation,
            image_spans=spans,
            cuts={cut.end: cut for cut in cuts},
            limit=min(sampling.max_new_tokens, self._settings.context - length),
            lookup=PromptLookup(request.token_ids, self._settings.lookup) if guesses else None,
        )
        self._scheduler.add(generation, ends)

    @torch.inference_mode()
    def turn(self) -> bool:
        """One turn; False: nothing runs and nobody waits."""
        for generation in [generation for generation in self._replies if generation.must_stop]:
            self._leave(generation)
            generation.end_early()
        self._admit()
        self._prefill_one_chunk()
        if replies := [self._replies[generation] for generation in self._scheduler.decoding]:
            self._decode(replies)
        return not self._scheduler.idle

    def _admit(self) -> None:
        def place(generation: QueuedGeneration, free: Sequence[int]) -> tuple[int, int]:
            return self._prefixes.choose(free, list(self._replies[generation].cuts.values()))

        for admission in self._scheduler.admit(place):
            reply = self._replies[admission.key]
            reply.slot = admission.slot
            self._prefixes.start(admission.slot, admission.reused)
            self._counters.reused_tokens += admission.reused
            self._batch.start(admission.slot, reply.request.sampling, reply.request.token_ids)

    def _leave(self, generation: QueuedGeneration) -> None:
        self._scheduler.remove(generation)
        del self._replies[generation]

    def _end(self, reply: _Reply, reason: FinishReason = "cancelled", error: GemmaOptError | None = None) -> None:
        self._leave(reply.generation)
        reply.generation.end(reason, error)

    def _hand_out(self, reply: _Reply, tokens: Sequence[int]) -> None:
        """Send newly drawn tokens, the reply's next ones. May end it."""
        for token in tokens:
            reply.last, reply.position = token, reply.position + 1
            if token in self._stop_ids:
                return self._end(reply, "stop")
            reply.generation.push(token)
            reply.given += 1
            self._counters.decoded_tokens += 1
            if reply.left == 0:
                return self._end(reply, "length")
        return None

    # Prefill

    def _prefill_one_chunk(self) -> None:
        """Compute one chunk; what another slot has computed already is copied, as much as there is."""
        while chunk := self._scheduler.next_chunk():
            reply = self._replies[chunk.key]
            cut = reply.cuts[chunk.end]
            source = None if chunk.last else self._prefixes.holder(cut)
            if source is not None:
                self._copy(source, chunk)
                self._prefixes.hold(chunk.slot, cut)
                self._counters.reused_tokens += chunk.end - chunk.start
                continue
            try:
                self._read(reply, chunk)
            except torch.OutOfMemoryError:
                self._end(reply, error=EngineError(OUT_OF_MEMORY))
            except TorchDynamoException as error:
                log.error("compilation failed", exc_info=error)
                self._end(reply, error=CompileError("a compile target of the recipe could not be compiled; see the log"))
            return

    def _copy(self, source: int, chunk: Chunk[QueuedGeneration]) -> None:
        """Take a chunk's keys and values over from another slot: in sliding layers what later positions look at."""
        for layer in self._cache.layers:
            begin = max(chunk.start, chunk.end - self._cache.window + 1) if layer.sliding else chunk.start
            if begin < chunk.end:
                layer.write_(chunk.slot, begin, *layer.read(source, begin, chunk.end))

    def _read(self, reply: _Reply, chunk: Chunk[QueuedGeneration]) -> None:
        """Compute a chunk and, after the last one, draw the first token."""
        self._prefixes.wrote(chunk.slot, chunk.end)
        embeddings = self._embed(reply, chunk.start, chunk.end)
        logits = self._prefill(chunk.slot, embeddings, chunk.start, reply.image_spans)
        self._prefixes.hold(chunk.slot, reply.cuts[chunk.end])
        self._counters.prefilled_tokens += chunk.end - chunk.start
        if chunk.last:
            token = self._first_token(logits, chunk.slot, chunk.end)
            reply.position = chunk.end - 1
            self._learn(reply, 0, [token], 1)

    def _embed(self, reply: _Reply, start: int, end: int) -> Tensor:
        """Embeddings [tokens, hidden] of a chunk of the prompt, its pictures in their places."""
        ids = reply.request.token_ids[start:end]
        embeddings = self._model.embed(self._index([0 if token == self._image_token_id else token for token in ids]))
        for index, (begin, stop) in enumerate(reply.image_spans):
            if self._pictures and start <= begin < end:
                request = reply.request
                soft_tokens = self._pictures.soft_tokens(request.image_keys[index], request.images[index])
                embeddings[begin - start : stop - start] = soft_tokens
                self._counters.pictures_encoded = self._pictures.encoded
        return embeddings

    # Decode

    def _decode(self, replies: Sequence[_Reply]) -> None:
        if self._ahead and not any(reply in replies for reply in self._ahead.replies):
            self._ahead = None
        guesses = [self._guess(reply, len(replies)) for reply in replies]
        if any(guesses):
            return self._decode_guessing(replies, guesses)
        under_way = self._ahead or self._launch(replies)
        self._ahead = self._launch_ahead(replies, under_way) if self._runs_ahead else None
        for reply, token in zip(under_way.replies, under_way.tokens(), strict=True):
            if reply.generation in self._replies:  # else it ended with the token before
                self._learn(reply, 0, [token], len(replies))
        return None

    def _launch(self, replies: Sequence[_Reply], under_way: Sequence[_Reply] = ()) -> _Step:
        """Start a step. under_way: those whose last token is not known here yet, though it is where the step reads it."""
        for reply in replies:
            self._prefixes.wrote(reply.slot, reply.position + (2 if reply in under_way else 1))
        self._counters.steps += 1
        return _Step(tuple(replies), self._step([reply.slot for reply in replies]))

    def _launch_ahead(self, replies: Sequence[_Reply], under_way: _Step) -> _Step | None:
        """Start the step after the one under way, before that one's tokens are read: so the device need not wait for the host.

        A reply that ends with the token under way is computed once in vain. Not while prompts are to be read.
        """
        if self._scheduler.reading:
            return None
        lasting = [reply for reply in replies if reply.left > (1 if reply in under_way.replies else 0)]
        return self._launch(lasting, under_way.replies) if lasting else None

    def _guess(self, reply: _Reply, rows: int) -> list[int]:
        return reply.lookup.guess(self._row_cost, rows)[: reply.left - 1] if reply.lookup else []

    def _decode_guessing(self, replies: Sequence[_Reply], guesses: Sequence[Sequence[int]]) -> None:
        """One step in which a reply has a row for its last token and one for each guess; right guesses are kept."""
        rows = [
            (token, reply.slot, reply.position + ahead)
            for reply, guess in zip(replies, guesses, strict=True)
            for ahead, token in enumerate((reply.last, *guess))
        ]
        self._counters.steps += 1
        tokens, slots, positions = (self._index(column) for column in zip(*rows, strict=True))
        logits = self._model.decode(tokens, slots, positions)
        drawn = self._batch.draw_apart(logits, [slot for _, slot, _ in rows], positions + 1).tolist()
        kept: list[tuple[_Reply, list[int], int]] = []
        for reply, guess in zip(replies, guesses, strict=True):
            due, drawn = drawn[: len(guess) + 1], drawn[len(guess) + 1 :]
            right = next((n for n, token in enumerate(guess) if due[n] != token), len(guess))
            self._prefixes.wrote(reply.slot, reply.position + len(guess) + 1)
            kept.append((reply, due[: right + 1], len(guess)))
            self._counters.guessed_tokens += len(guess)
            self._counters.right_guesses += right
        self._batch.feed(
            self._index([reply.slot for reply, _, _ in kept]),
            self._index([due[-1] for _, due, _ in kept]),
            self._index([reply.position + len(due) for reply, due, _ in kept]),
        )
        for reply, due, guessed in kept:
            self._learn(reply, guessed, due, len(replies))

    def _learn(self, reply: _Reply, guessed: int, drawn: Sequence[int], rows: int) -> None:
        if reply.lookup:
            reply.lookup.learn(guessed, drawn, self._row_cost, rows)
        self._hand_out(reply, drawn)

    def _measure_row_cost(self) -> float:
        """What one more row adds to a decode step, as a share of a step with one row. See `lookup.pays`."""
        more = self._settings.lookup

        def seconds(rows: int) -> float:
            row = torch.arange(rows, device=self._device)
            started = time.perf_counter()
            self._model.decode(torch.zeros_like(row), row // (1 + more), row % (1 + more)).argmax(-1).tolist()
            return time.perf_counter() - started

        if self._device.type == "cuda":  # such steps are not recorded: what they may need is compiled here
            for rows in row_counts(self._settings.slots * (1 + more)):
                seconds(rows)
        one, many = (min(seconds(rows) for _ in range(COST_ROUNDS)) for rows in (1, 1 + more))
        return max(0.0, many / one - 1) / more

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _recorded_encoder(model: GemmaModel, recorder: Recorder) -> Encode:
    """Raises CompileError if the recipe has the tower compiled and that fails."""
    try:
        return picture_encoder(model, recorder if weights_device(model).type == "cuda" else None)
    except TorchDynamoException as error:
        raise CompileError("the vision tower could not be compiled") from error


def picture_spans(token_ids: Sequence[int], image_token_id: int | None) -> list[Span]:
    """begin ≤ p < end of every run of soft tokens: one for each picture or crop."""
    spans: list[Span] = []
    for position, token in enumerate(token_ids):
        if token == image_token_id:
            begin = spans.pop()[0] if spans and spans[-1][1] == position else position
            spans.append((begin, position + 1))
    return spans
