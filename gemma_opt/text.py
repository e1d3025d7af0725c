"""Token ids → text deltas: whole characters only, and never a stop string or a part of one.

Every id is turned into bytes by itself: a byte token into its byte, a control token into none, any other piece into its
UTF-8. One incremental decoder makes characters of them. So the work per token does not grow with the reply, which
decoding all ids again and sending the difference would, and a character that several byte tokens spell comes out whole.

For valid text the joined deltas are what `tokenizer.decode(ids, skip_special_tokens=True)` gives. For invalid bytes they
are Python's `bytes.decode("utf-8", "replace")`; transformers' decoder writes a U+FFFD for every single byte instead.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from gemma_opt.errors import ParameterError

if TYPE_CHECKING:  # this module needs a tokenizer, not the library that brought it
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@functools.lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """Tokens that stand for no text, and their ids: those of the special roles, and all that are added as special.

    Published Gemma 3 checkpoints give <start_of_turn> and <end_of_turn> no role, and GGUF files add thousands of <unusedN>.
    Kept, because Gemma 3 has 6,000 added tokens and a loaded tokenizer does not change.
    """
    named = zip(map(str, tokenizer.all_special_tokens), tokenizer.all_special_ids, strict=True)
    added = ((token.content, token_id) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return MappingProxyType(dict(named) | dict(added))


@functools.lru_cache(maxsize=4)
def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(control_tokens(tokenizer).values())


class TextStream:
    """The text of one reply: push token ids, send what comes back, send what `finish` gives.

    A text ends before the stop string that is complete first; of several complete at one character, before the one that
    starts first. This depends on the text alone, not on how tokens cut it. After it nothing more comes.
    Raises ParameterError (E1005) for an empty stop string: it would end every text before it starts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_sequences: Sequence[str] = ()) -> None:
        if not all(stop_sequences):
            raise ParameterError("stop_sequences must not hold an empty string")
        self._tokenizer = tokenizer
        self._control = _control_ids(tokenizer)
        self._stops = tuple(stop_sequences)
        prefixes = {stop[:length] for stop in stop_sequences for length in range(1, len(stop))}
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, and possibly the beginning of a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; generating more is then a waste."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """The text that may be sent now that this token is known; often ""."""
        return self._release(self._decoder.decode(self._bytes_of(token_id)))

    def finish(self) -> str:
        """The rest, once no token follows. What began like a stop string was none; half a character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        # None: Gemma 3's embedding has more rows than its tokenizer has pieces.
        if token_id in self._control or not isinstance(piece, str):
            return b""
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def _release(self, text: str) -> str:
        """Add `text`, take out what can no longer become part of a stop string."""
        if self._stopped:
            return ""
        pending = self._held + text
        met = [(start + len(stop), start) for stop in self._stops if (start := pending.find(stop)) >= 0]
        if met:
            self._stopped, self._held = True, ""
            return pending[: min(met)[1]]
        free = len(pending) - next((len(prefix) for prefix in self._prefixes if pending.endswith(prefix)), 0)
        self._held = pending[free:]
        return pending[:free]
