"""What to calibrate on: windows of text, conversations with pictures, the built-in picture task, or what the model writes.

Text files are cut into windows of `window_tokens`, `<bos>` first. A `.jsonl` file holds one sample a line:

    {"text": "a document"}
    {"text": "What is this?", "image": "cat.png", "answer": "A cat."}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

`image` is a path beside the file, or a data URI; messages are those of a request, and may end with the assistant's answer.
Every source gives an equal share of the windows, chosen by the seed; where one has fewer, the others give more.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from gemma_opt import charts
from gemma_opt.errors import GemmaOptError, RecipeError
from gemma_opt.gemma import Processing, sha256_of
from gemma_opt.images import decode_image, load_image
from gemma_opt.prompt import PromptEncoder, Turn, parse_messages, read_message, single_turn
from gemma_opt.recipe import Calibration

CHARTS, SELF = "charts", "self"
BUILT_IN = (CHARTS, SELF)
RANDOM_WINDOWS, RANDOM_TOKENS = 4, 256
CONTEXT = 131_072  # samples are cut to the window here; the encoder's own limit would only refuse


@dataclass(frozen=True)
class Sample:
    """One sequence, alone in its batch. token_ids: int64 [1, tokens]; images: float32 [pictures, 3, side, side] or None.

    answer_tokens: how many tokens at the end are the answer to what stands before; None where there is no answer.
    """

    token_ids: Tensor
    images: Tensor | None = None
    answer_tokens: int | None = None


Draw = Callable[[], Sample]
Write = Callable[[Calibration], Iterator[Sample]]


def draw_samples(
    section: Calibration, processing: Processing, key: str = "calibration.source", write: Write | None = None
) -> tuple[Sample, ...]:
    """The calibration set of a recipe. The same files and section give the same samples. key: of the sources, for errors.

    write: writes the samples of the source "self", see `written.Author`. Raises RecipeError where a source cannot be read, or
    all together hold fewer windows than asked.
    """
    offers = [_offer(source, number, section, processing, key, write) for number, source in enumerate(section.source)]
    taken = _shares([len(offer) for offer in offers], section.windows)
    if sum(taken) < section.windows:
        held = ", ".join(f"{source}: {len(offer)}" for source, offer in zip(section.source, offers, strict=True))
        raise RecipeError(
            f"{key}: {section.windows} windows of {section.window_tokens} tokens are asked, the sources hold "
            f"{sum(taken)} ({held}). Give more text, or set {key.partition('.')[0]}.windows lower"
        )
    return tuple(draw() for offer, count in zip(offers, taken, strict=True) for draw in offer[:count])


def random_samples(vocabulary: int, begin: int, reserved: int) -> tuple[Sample, ...]:
    """Windows of random tokens, always the same: for formats that look at inputs where no data is given.

    Channels that are large for any token are large here too, which is what smoothing and the weighing of int4 groups ask.
    vocabulary: how many tokens there are; begin: the token that every window starts with; reserved: one that never comes (a
    picture's, without a picture).
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (RANDOM_WINDOWS, RANDOM_TOKENS), generator=generator)
    drawn = drawn.masked_fill(drawn == reserved, begin)
    drawn[:, 0] = begin
    return tuple(Sample(row[None]) for row in drawn)


def sources_identity(section: Calibration, key: str = "calibration.source") -> dict[str, str]:
    """sha256 of every source file, by the name the recipe gives it. Raises RecipeError for one that is missing."""
    return {source: source if source in BUILT_IN else sha256_of(_existing(source, key)) for source in section.source}


def _shares(held: Sequence[int], wanted: int) -> list[int]:
    """How many each source gives: as even as they allow, earlier sources first where it does not divide."""
    taken = [0] * len(held)
    while sum(taken) < wanted and any(count < limit for count, limit in zip(taken, held, strict=True)):
        smallest = min(count for count, limit in zip(taken, held, strict=True) if count < limit)
        index = next(index for index, count in enumerate(taken) if count == smallest and count < held[index])
        taken[index] += 1
    return taken


def _existing(source: str, key: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        built_in = " or ".join(map(repr, BUILT_IN))
        raise RecipeError(f"{key}: there is no file {source} (seen from the current folder), and it is not {built_in}")
    if not os.access(path, os.R_OK):
        raise RecipeError(f"{key}: {source} may not be read")
    return path


def _offer(source: str, number: int, section: Calibration, processing: Processing, key: str, write: Write | None) -> list[Draw]:
    """Everything a source could give, shuffled by the seed; each sample is made only when it is drawn."""
    rng = random.Random(f"{section.seed}/{number}")
    if source == SELF:
        if write is None:
            raise RecipeError(f"{key}: nobody was given who writes {SELF!r}")
        written = write(section)
        return [lambda: next(written)] * section.windows
    if source == CHARTS:
        if processing.processor is None:
            raise RecipeError(
                f"{key}: charts are pictures, and this model has no vision tower. Name text, or let it write some: "
                f"--set '{key}=[self]'"
            )
        return [_chart_draw(section, processing, index) for index in range(section.windows)]
    path = _existing(source, key)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{key}: {source} is not UTF-8 text") from None
    if path.suffix == ".jsonl":
        lines = [(index, line) for index, line in enumerate(text.splitlines(), start=1) if line.strip()]
        offer = [_line_draw(path, f"{key}: {path.name} line {index}", line, section, processing) for index, line in lines]
    else:
        offer = _text_draws(text, section, processing)
    rng.shuffle(offer)
    return offer


def _text_draws(text: str, section: Calibration, processing: Processing) -> list[Draw]:
    tokenizer, step = processing.tokenizer, section.window_tokens - 1
    bos = cast(int, tokenizer.bos_token_id)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than a context on purpose

    def draw(start: int) -> Draw:
        return lambda: _sample([bos, *ids[start : start + step]], (), section)

    return [draw(start) for start in range(0, len(ids) - step + 1, step)]


def _chart_draw(section: Calibration, processing: Processing, index: int) -> Draw:
    def draw() -> Sample:
        picture = charts.draw("train", section.seed, index)
        question = picture.questions[index % len(picture.questions)]
        return _conversation(single_turn(question.text, "", [picture.image]), question.answer, section, processing)

    return draw


def _line_draw(path: Path, where: str, line: str, section: Calibration, processing: Processing) -> Draw:
    def draw() -> Sample:
        try:
            turns, answer = _read_line(line, path.parent)
            return _conversation(turns, answer, section, processing)
        except (GemmaOptError, OSError, ValueError) as error:
            reason = error.message if isinstance(error, GemmaOptError) else str(error)
            raise RecipeError(f"{where}: {reason}") from None

    return draw


def _read_line(line: str, folder: Path) -> tuple[tuple[Turn, ...], str]:
    """One line of JSONL → the conversation and the answer to it ("" without one)."""
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ValueError("is not an object")
    known = {"messages", "answer"} if "messages" in fields else {"text", "image", "answer"}
    if unknown := fields.keys() - known:
        raise ValueError(f"has unknown fields: {', '.join(sorted(unknown))}")
    texts = {name: value for name, value in fields.items() if name != "messages" and value is not None}
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ValueError(f"{', '.join(sorted(wrong))} must be a text")

    def picture(source: str) -> Image.Image:
        return load_image(source) if source.startswith("data:") else decode_image((folder / source).read_bytes())

    answer = texts.get("answer", "")
    if "messages" not in fields:
        return single_turn(texts.get("text", ""), "", [picture(texts["image"])] if texts.get("image") else []), answer
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise ValueError("messages must be a list")
    if len(messages) > 1:
        role, parts = read_message(messages[-1], f"messages[{len(messages) - 1}]")
        if role == "assistant":
            messages, answer = messages[:-1], "".join(text for _, text in parts)
    return parse_messages(messages, picture), answer


def _conversation(turns: tuple[Turn, ...], answer: str, section: Calibration, processing: Processing) -> Sample:
    prompt = PromptEncoder(processing, CONTEXT).encode(turns)
    if not answer:
        return _sample(prompt.token_ids, prompt.images, section)
    reply = processing.tokenizer.encode(answer, add_special_tokens=False)
    sample = _sample([*prompt.token_ids, *reply], prompt.images, section)
    return replace(sample, answer_tokens=max(0, sample.token_ids.shape[1] - len(prompt.token_ids)))


def _sample(token_ids: Sequence[int], images: Sequence[Tensor], section: Calibration) -> Sample:
    """Cut to the window. Raises ValueError where that would cut into the pictures, which come first."""
    ids = torch.tensor([token_ids[: section.window_tokens]])
    if not images:
        return Sample(ids)
    if len(token_ids) > section.window_tokens:
        raise ValueError(
            f"takes {len(token_ids)} tokens with its pictures, calibration.window_tokens is {section.window_tokens}"
        )
    return Sample(ids, torch.stack(list(images)))
