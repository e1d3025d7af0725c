"""Calibration text that the model writes itself, for recipes that need data where nobody has any.

What calibration must keep is what the model does on text that it finds likely, and it can draw such text: one token after
another from its own distribution, nothing cut off. A pretrained model writes documents, from `<bos>` on. One with a chat
template writes what a user might ask, in the place where the template puts a user's words, and then answers it. Sources:
Williams et al. 2024, arXiv:2410.17170; for the questions Xu et al. 2024, arXiv:2406.08464.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gemma_opt.calibration.samples import CONTEXT, Sample
from gemma_opt.calibration.store import Store
from gemma_opt.errors import RecipeError
from gemma_opt.gemma import GemmaModel, Processing, stop_token_ids, weights_device
from gemma_opt.onednn import OneDnnLinears
from gemma_opt.prompt import PromptEncoder, single_turn
from gemma_opt.recipe import Calibration
from gemma_opt.text import control_tokens

BATCH = 32  # texts that are written side by side, at most
SHORTEST = 16  # tokens: less is no text
QUESTION_SHARE = 4  # a question takes at most one in so many tokens of its window
FRUITLESS = 4  # batches in a row without one text, after which the model is given up

Progress = Callable[[int, int], None]
Ids = Sequence[int]


class Author:
    """A model that writes the samples of a calibration section: the same ones for the same model, device and section.

    store: keeps finished batches, for a build that goes on after a kill. progress(tokens of a text, most of them): called at
    every step of a batch.
    """

    def __init__(
        self,
        model: GemmaModel,
        processing: Processing,
        store: Store | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._model = model
        self._processing = processing
        self._store = store or Store()
        self._progress = progress
        self._stops = sorted(stop_token_ids(model))
        controls = set(control_tokens(processing.tokenizer).values()) - set(self._stops)
        self._controls = torch.tensor(sorted(controls), device=weights_device(model))

    def write(self, section: Calibration) -> Iterator[Sample]:
        """Sequences of at most `window_tokens`, without end. Raises RecipeError for a model that ends every text at once."""
        fruitless = 0
        for number in count():
            samples = self._batch(section, number)
            fruitless = 0 if samples else fruitless + 1
            if fruitless == FRUITLESS:
                raise RecipeError(
                    f"this model writes no text in windows of {section.window_tokens} tokens by itself: name files of text"
                )
            yield from samples

    def _batch(self, section: Calibration, number: int) -> list[Sample]:
        rows = min(BATCH, section.windows)
        name = f"{section.seed}.{section.window_tokens}.{rows}.{number}"
        if (kept := self._store.load(name)) is None:
            device = weights_device(self._model)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(section.seed * 1_000_003 + number)
                write = self._conversations if self._processing.tokenizer.chat_template else self._documents
                texts = write(rows, section.window_tokens)
            kept = {
                f"{index:02}.{len(prompt)}": torch.tensor([[*prompt, *text]])
                for index, (prompt, text) in enumerate(texts)
                if text and len(prompt) + len(text) >= SHORTEST
            }
            if kept:
                self._store.save(name, kept)
        return [Sample(kept[key], answer_tokens=kept[key].shape[1] - int(key.partition(".")[2])) for key in sorted(kept)]

    def _documents(self, rows: int, window: int) -> list[tuple[Ids, Ids]]:
        """What stands before each text, and the text."""
        begin = [self._model.config.get_text_config().bos_token_id]
        return [(begin, text) for text in self._continued([begin] * rows, window - 1)]

    def _conversations(self, rows: int, window: int) -> list[tuple[Ids, Ids]]:
        """Prompts, and the replies to them."""
        encoder = PromptEncoder(self._processing, CONTEXT)

        def prompt_of(question: str) -> tuple[int, ...]:
            return encoder.encode(single_turn(question, "", ())).token_ids

        alike = takewhile(lambda pair: pair[0] == pair[1], zip(prompt_of("A"), prompt_of("b"), strict=False))
        opening = [token for token, _ in alike]  # all that stands before a user's words
        written = self._continued([opening] * rows, window // QUESTION_SHARE)
        questions = [str(self._processing.tokenizer.decode(ids)).strip() for ids in written]
        prompts = [prompt_of(question) for question in questions if question]
        if not prompts:
            return []
        room = window - max(map(len, prompts))
        return list(zip(prompts, self._continued(prompts, room), strict=True))

    @torch.inference_mode()
    def _continued(self, prompts: Sequence[Ids], most: int) -> list[list[int]]:
        """What the model writes after each prompt, up to its end, and at most so many tokens."""
        if most < 1:
            return [[] for _ in prompts]
        rows = [torch.tensor(prompt, device=weights_device(self._model)) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        seen = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        longest = ids.shape[1]
        settings = GenerationConfig(
            max_new_tokens=most, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=self._stops, pad_token_id=self._stops[0],
        )  # fmt: skip
        plain = _PlainText(self._controls, lambda length: self._progress(length - longest, most))
        with OneDnnLinears():
            generate = cast(Any, self._model).generate  # typed for a protocol that no model class fulfils
            output: Tensor = generate(
                ids, attention_mask=seen, generation_config=settings, logits_processor=LogitsProcessorList([plain])
            )
        texts = output[:, longest:].tolist()
        return [text[: next((place for place, token in enumerate(text) if token in self._stops), None)] for text in texts]


class _PlainText(LogitsProcessor):
    """Lets no control token be drawn, and tells how long the sequences are."""

    def __init__(self, controls: Tensor, tell: Callable[[int], None]) -> None:
        self._controls = controls
        self._tell = tell

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Called by `generate` before every draw; input_ids: [rows, tokens]; scores: [rows, vocabulary], changed in place."""
        self._tell(input_ids.shape[1])
        return scores.index_fill_(1, self._controls, -torch.inf)
