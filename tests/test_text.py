"""Deltas against the tokenizer's own decoder, Python's UTF-8 decoder, and plain `str.find`."""

import random
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gemma_opt.errors import ParameterError
from gemma_opt.text import TextStream

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "weights_cache" / "small-gemma3"

ALPHABET = [
    *"abc XYZ  \n\n\t,.<>'\"{}0123",
    "  ",
    "the ",
    "bar ",
    "é",
    "ß",
    "ñ",
    "\u0301",
    "漢",
    "字",
    "한",
    "я",
    "😀",
    "👩\u200d🚀",
    "\U0010ffff",
]
EMOJI = "😀"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's tokenizer; where it has not been trained yet, the same one freshly built."""
    if BUNDLED.is_dir():
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(BUNDLED))
    script = runpy.run_path(str(ROOT / "scripts" / "train_small_gemma.py"))
    return cast(PreTrainedTokenizerBase, script["build_tokenizer"]())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def byte_ids(tokenizer: PreTrainedTokenizerBase, data: bytes) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])
    assert isinstance(ids, list)
    return ids


def run(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """All deltas, `finish` last."""
    stream = TextStream(tokenizer, stops)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()], stream


def first_completed_stop(text: str, stops: Sequence[str]) -> int:
    """The naive rule: grow the text by one character until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return len(text)


def random_text(rng: random.Random, pieces: Sequence[str] = ALPHABET, longest: int = 40) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, longest)))


# Characters


@pytest.mark.parametrize("seed", range(10))
def test_joined_deltas_are_the_decoded_text(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        text = random_text(rng)
        ids = encode(tokenizer, text)
        deltas, stream = run(tokenizer, ids)
        assert "".join(deltas) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in delta for delta in deltas)
        assert not stream.stopped


def test_a_character_comes_with_its_last_byte(tokenizer: PreTrainedTokenizerBase) -> None:
    deltas, _ = run(tokenizer, byte_ids(tokenizer, EMOJI.encode()))
    assert deltas == ["", "", "", EMOJI, ""]


@pytest.mark.parametrize("seed", range(10))
def test_invalid_bytes_are_replaced_as_python_does(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    rng = random.Random(seed)
    lead = [0x41, 0x80, 0xBF, 0xC3, 0xE2, 0x82, 0xAC, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0xF8, 0xFF]
    for _ in range(20):
        data = bytes(rng.choice(lead) if rng.random() < 0.9 else rng.randrange(256) for _ in range(rng.randint(0, 30)))
        deltas, _ = run(tokenizer, byte_ids(tokenizer, data))
        assert "".join(deltas) == data.decode("utf-8", "replace")


def test_half_a_character_at_the_end_is_replaced_by_finish(tokenizer: PreTrainedTokenizerBase) -> None:
    deltas, _ = run(tokenizer, [*encode(tokenizer, "a"), *byte_ids(tokenizer, EMOJI.encode()[:3])])
    assert deltas == ["a", "", "", "", "\ufffd"]


def test_text_that_spells_a_byte_token_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("<0x41>", "x<0xFF>y", "<0xff>", "<bos", "▁"):
        deltas, _ = run(tokenizer, encode(tokenizer, text))
        assert "".join(deltas) == text.replace("▁", " ")


def test_control_tokens_give_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    control = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert {0, 1, 2, 105, 106} <= control
    deltas, _ = run(tokenizer, [*sorted(control), *encode(tokenizer, "hi"), *sorted(control)])
    assert "".join(deltas) == "hi"


def test_added_newlines_are_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma's runs of newlines are added tokens, but not control tokens."""
    ids = encode(tokenizer, "a\n\n\nb")
    assert len(ids) == 3
    assert run(tokenizer, ids)[0] == ["a", "\n\n\n", "b", ""]


def test_an_id_beyond_the_tokenizer_gives_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gemma 3's embedding has 64 rows more than its tokenizer has tokens; a first version wrote such an id as "None"."""
    assert run(tokenizer, [len(tokenizer), len(tokenizer) + 63])[0] == ["", "", ""]


# Stop strings


@pytest.mark.parametrize("seed", range(10))
def test_text_ends_before_the_first_stop_string(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Few letters, so that stop strings overlap, repeat and nest; the same text cut into other tokens gives the same."""
    rng = random.Random(seed)
    letters = ("a", "b", "ab", "é", EMOJI, "\n")
    for _ in range(30):
        text = random_text(rng, letters, longest=25)
        stops = [stop for _ in range(rng.randint(1, 3)) if (stop := random_text(rng, letters, longest=4))]
        wanted = text[: first_completed_stop(text, stops)]
        for ids in (encode(tokenizer, text), byte_ids(tokenizer, text.encode())):
            deltas, stream = run(tokenizer, ids, stops)
            assert "".join(deltas) == wanted
            assert stream.stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize("seed", range(10))
def test_no_delta_shows_the_beginning_of_a_stop_string_that_follows(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """What was sent can never be taken back: at every moment it is a prefix of the final text."""
    rng = random.Random(seed)
    for _ in range(10):
        text = random_text(rng, ("a", "b", "c"), longest=20) + "abcabd" + random_text(rng)
        ids = encode(tokenizer, text)
        final = text[: text.find("abcabd")]
        stream, sent = TextStream(tokenizer, ["abcabd"]), ""
        for token_id in ids:
            sent += stream.push(token_id)
            assert final.startswith(sent)
        assert sent == final
        assert stream.stopped


@pytest.mark.parametrize("cut", range(1, len("\n\nUser: 😀")))
def test_a_stop_string_may_be_cut_anywhere(tokenizer: PreTrainedTokenizerBase, cut: int) -> None:
    stop = "\n\nUser: 😀"
    ids = [
        *encode(tokenizer, "Yes."),
        *encode(tokenizer, stop[:cut]),
        *encode(tokenizer, stop[cut:]),
        *encode(tokenizer, "more"),
    ]
    deltas, stream = run(tokenizer, ids, [stop])
    assert "".join(deltas) == "Yes."
    assert stream.stopped


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("STOP here", ["STOP"], ""),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("one STO", ["STOP"], "one STO"),
        ("one STO two", ["STOP"], "one STO two"),
        ("x ababc", ["ababc", "abx"], "x "),
        ("abcd", ["bcd", "abcd"], ""),  # complete at the same character: the one that starts first
        ("abcd", ["abcd", "bc"], "a"),  # one inside the other: the one that is complete first
        ("abcd", ["ab", "abcd"], ""),
        ("fine 😀!", ["😀"], "fine "),
        ("fine 😀!", ["e 😀"], "fin"),
        ("fine 😁!", ["😀"], "fine 😁!"),  # the first three of four bytes are the same
        ("é", ["\u0301"], "é"),
        ("a. b", [" "], "a."),
        ("", ["x"], ""),
    ],
)
def test_examples(tokenizer: PreTrainedTokenizerBase, text: str, stops: list[str], wanted: str) -> None:
    for ids in (encode(tokenizer, text), byte_ids(tokenizer, text.encode())):
        assert "".join(run(tokenizer, ids, stops)[0]) == wanted


def test_what_only_began_like_a_stop_string_comes_with_finish(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ["END OF TEXT"])
    sent = "".join(stream.push(token_id) for token_id in byte_ids(tokenizer, b"ok END OF"))
    assert (sent, stream.finish(), stream.finish()) == ("ok ", "END OF", "")
    assert not stream.stopped


def test_nothing_comes_after_a_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ["!"])
    assert [stream.push(token_id) for token_id in byte_ids(tokenizer, b"a!b" + EMOJI.encode()[:2])] == ["a", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match=r"^E1005 .*empty"):
        TextStream(tokenizer, ["a", ""])
