"""Requests in words and pictures → token ids and pixel values.

The chat template of the checkpoint writes the prompt; three things it does not do are done here. Special tokens inside
what a user wrote stay text: while the template is rendered, a sentinel stands for every character that could start one, so
that none can come about where the template joins two parts; the text between the template's own control tokens is then
encoded with special tokens switched off. There is exactly one `<bos>`. Pictures become the processor's own sequence of
soft tokens. For ordinary text the ids equal transformers' processor exactly.

A model without a chat template (pretrained, not instruction-tuned) gets the prompt as it is, after `<bos>`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gemma_opt.errors import ConflictingInputs, EmptyPrompt, ImagesUnsupported, MessagesError, PromptTooLong
from gemma_opt.gemma import Processing
from gemma_opt.text import control_tokens

MAX_IMAGES = 16
MAX_CHARACTERS = 2_000_000  # over any context this serves; refused before the tokenizer spends time on it
MAX_MESSAGES = 1000
TEXT_ONLY = "this model reads text only: send no image"

Picture = Image.Image | Callable[[], Image.Image]
"""A picture, or what fetches and decodes it: a prompt's pictures are never all decoded at once."""
Part = str | Picture


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: who, and its texts and pictures in order."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class EncodedPrompt:
    """Model inputs. images: one [3, side, side] float32 tensor per picture or pan-and-scan crop, in prompt order."""

    token_ids: tuple[int, ...]
    images: tuple[Tensor, ...]
    image_count: int


def single_turn(prompt: str, system_prompt: str, images: Sequence[Picture]) -> tuple[Turn, ...]:
    """A conversation of one user message: pictures first, as Gemma's own examples have them."""
    if not prompt.strip():
        raise EmptyPrompt("prompt is empty: give prompt, or messages")
    system = (Turn("system", (system_prompt,)),) if system_prompt.strip() else ()
    return (*system, Turn("user", (*images, prompt)))


def parse_messages(messages: Sequence[object], load_image: Callable[[str], Picture]) -> tuple[Turn, ...]:
    """OpenAI-style messages → turns. `load_image` turns an image URL into a picture; called after all else is checked.

    Content is a string or a list of {"type": "text", "text": …} and {"type": "image_url", "image_url": {"url": …}}.
    Raises MessagesError (E1004) that names the offending message, EmptyPrompt, or what `load_image` raises.
    """
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise MessagesError(f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(messages)}")
    read = [read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    _check_order([role for role, _ in read])
    if not any(kind == "image" or value.strip() for kind, value in read[-1][1]):
        raise EmptyPrompt("the last message is empty")
    if sum(kind == "image" for _, parts in read for kind, _ in parts) > MAX_IMAGES:
        raise MessagesError(f"messages hold more than {MAX_IMAGES} pictures")
    return tuple(
        Turn(role, tuple(load_image(value) if kind == "image" else value for kind, value in parts)) for role, parts in read
    )


_RawPart = tuple[Literal["text", "image"], str]
_ROLES: dict[object, Literal["system", "user", "assistant"]] = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
}  # fmt: skip


def read_message(message: object, where: str) -> tuple[Literal["system", "user", "assistant"], list[_RawPart]]:
    """Role and parts of one message; of a picture its URL. Raises MessagesError, in which `where` names the message."""
    if not isinstance(message, dict):
        raise MessagesError(f"{where} is not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise MessagesError(f"{where}.role must be system, user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        return _ROLES[role], [("text", content)]
    if not isinstance(content, list) or not content:
        raise MessagesError(f"{where}.content must be a string or a list of parts")
    parts = [_read_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if _ROLES[role] != "user" and any(kind == "image" for kind, _ in parts):
        raise MessagesError(f"{where}: only user messages can hold pictures")
    return _ROLES[role], parts


def _read_part(part: object, where: str) -> _RawPart:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if isinstance(part, dict) and part.get("type") == "image_url":
        link = part.get("image_url")
        url = link.get("url") if isinstance(link, dict) else link
        if isinstance(url, str):
            return "image", url
    raise MessagesError(f'{where} must be {{"type": "text", "text": …}} or {{"type": "image_url", "image_url": {{"url": …}}}}')


def _check_order(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns:
        raise MessagesError("messages hold no user message")
    for index, role in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if role != expected:
            number = index + len(roles) - len(turns)
            raise MessagesError(
                f"messages[{number}].role is {role}, expected {expected}: user and assistant take turns, after the system"
            )
    if turns[-1] != "user":
        raise MessagesError("the last message must be the user's")


_SENTINEL = 0x10FE00  # in the last private-use plane, and one more for each further character that starts a control token
_CROP_PARAMETERS = ("pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops", "pan_and_scan_min_ratio_to_activate")


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer under transformers' wrapper."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"{type(tokenizer).__name__} is not built on the tokenizers library")
    return backend


@functools.lru_cache(maxsize=4)
def _plain_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy that reads special tokens as text. The switch belongs to the object, and requests run on many threads.

    Kept: copying Gemma 3's takes over a second, and calibration makes an encoder for every sample.
    """
    plain = Tokenizer.from_str(backend_of(tokenizer).to_str())
    plain.encode_special_tokens = True
    return plain


class PromptEncoder:
    """Encodes conversations for one checkpoint.

    context: tokens a slot holds; a prompt must leave room for at least one reply token.
    """

    def __init__(self, processing: Processing, context: int) -> None:
        self.context = context
        self._tokenizer = processing.tokenizer
        self._processor = processing.processor
        self._plain = _plain_of(processing.tokenizer)
        self._control = control_tokens(processing.tokenizer)
        self._lengths = sorted({len(token) for token in self._control}, reverse=True)
        starts = sorted({token[0] for token in self._control})
        self._start = re.compile("|".join(map(re.escape, starts)))
        sentinels = {ord(start): _SENTINEL + number for number, start in enumerate(starts)}
        # Sentinels that the user wrote are dropped: private-use characters have no meaning in text.
        self._hide = dict.fromkeys(sentinels.values()) | sentinels
        self._show = {sentinel: start for start, sentinel in sentinels.items()}

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint was tuned to answer (False: it continues text)."""
        return bool(self._tokenizer.chat_template)

    def encode(self, turns: Sequence[Turn], *, pan_and_scan: bool = False) -> EncodedPrompt:
        """Token ids and pixel values of a conversation.

        pan_and_scan: also send crops of pictures that are much wider or higher than square.
        Pictures that are yet to be had are asked for one after another, once it is known that their tokens fit.
        Raises PromptTooLong (E1002), ImagesUnsupported (E1012), ConflictingInputs (E1003), or what a picture raises.
        """
        pictures = [part for turn in turns for part in turn.parts if not isinstance(part, str)]
        if pictures and self._processor is None:
            raise ImagesUnsupported(TEXT_ONLY)
        characters = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
        if characters > MAX_CHARACTERS:
            raise PromptTooLong(f"the prompt has {characters:,} characters, at most {MAX_CHARACTERS:,} are read")
        if not pictures:
            return EncodedPrompt(tuple(self._ids_of(turns, [])), (), 0)
        whole = self._sequence(crops=0)
        room = self.context - 1 - len(self._ids_of(turns, [whole] * len(pictures)))
        pixels: list[Tensor] = []
        sequences: list[str] = []
        for picture in pictures:
            images, sequence = self._encode_picture(picture, pan_and_scan)
            pixels += images
            sequences.append(sequence)
            room -= len(self._encode_text(sequence)) - len(self._encode_text(whole))  # a token too few at most: to stop early
            if room < 0:
                self._refuse(self.context - 1 - room)
        return EncodedPrompt(tuple(self._ids_of(turns, sequences)), tuple(pixels), len(pictures))

    def _ids_of(self, turns: Sequence[Turn], sequences: list[str]) -> list[int]:
        token_ids = self._encode_text(self._render(turns, sequences))
        if len(token_ids) > self.context - 1:
            self._refuse(len(token_ids))
        return token_ids

    def _refuse(self, tokens: int) -> NoReturn:
        raise PromptTooLong(
            f"the prompt has {tokens:,} tokens, at most {self.context - 1:,} fit the context of {self.context:,}"
        )

    def _sequence(self, crops: int) -> str:
        """The text that stands for a picture of which the model also sees so many crops."""
        return self._processor.replace_image_token({"num_crops": [crops]}, 0) if self._processor else ""

    def _encode_picture(self, picture: Picture, pan_and_scan: bool) -> tuple[tuple[Tensor, ...], str]:
        """Pixel tensors of a picture and its crops, and the text that stands for it."""
        if self._processor is None:
            raise ImagesUnsupported(TEXT_ONLY)
        image = picture if isinstance(picture, Image.Image) else picture()
        pictures_in = self._processor.image_processor
        # The published checkpoints leave the cropping parameters empty; the processor class holds their defaults.
        defaults = cast(dict[str, float], self._processor.images_kwargs)
        crop = {name: getattr(pictures_in, name) or defaults[name] for name in _CROP_PARAMETERS}
        features = pictures_in([image], do_pan_and_scan=pan_and_scan, **crop, return_tensors="pt")
        return torch.unbind(features["pixel_values"]), self._sequence(int(features["num_crops"][0]))

    def _render(self, turns: Sequence[Turn], sequences: list[str]) -> str:
        """The prompt as text, in which only the template's own control tokens can be read."""
        if not self.has_chat_template:
            return self._render_plain(turns, sequences)
        images = iter(sequences)
        messages: list[dict[str, Any]] = []  # transformers types messages as plain strings, and its templates take parts
        for turn in turns:
            content: list[dict[str, str]] = []
            for part in turn.parts:
                is_text = isinstance(part, str)
                content.append({"type": "text", "text": self._hide_control_tokens(part)} if is_text else {"type": "image"})
            if turn.role == "system":  # Gemma's template reads the first part of a system message only
                content = [{"type": "text", "text": "".join(item["text"] for item in content)}]
            messages.append({"role": turn.role, "content": content})
        text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        image_token = self._processor.boi_token if self._processor else None
        return re.sub(re.escape(image_token), lambda _: next(images), text) if image_token else text

    def _render_plain(self, turns: Sequence[Turn], sequences: list[str]) -> str:
        if len(turns) != 1:
            raise ConflictingInputs(
                "this model has no chat template: it continues one prompt, without system prompt and messages"
            )
        images = iter(sequences)
        parts = [self._hide_control_tokens(part) if isinstance(part, str) else next(images) for part in turns[0].parts]
        return f"{self._tokenizer.bos_token}{''.join(parts)}"

    def _hide_control_tokens(self, text: str) -> str:
        return text.translate(self._hide)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for start in self._start.finditer(text):
            if token := self._control_token_at(text, start.start()):
                ids += self._encode_plain(text[end : start.start()])
                ids.append(self._control[token])
                end = start.start() + len(token)
        return ids + self._encode_plain(text[end:])

    def _control_token_at(self, text: str, place: int) -> str | None:
        """The longest one. Looked up by length: a pattern of thousands would try them all at every place."""
        pieces = (text[place : place + length] for length in self._lengths)
        return next((piece for piece in pieces if piece in self._control), None)

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        # A batch of one: for a batch the tokenizer lets other threads run, and a long prompt takes it seconds.
        return self._plain.encode_batch_fast([text.translate(self._show)], add_special_tokens=False)[0].ids
