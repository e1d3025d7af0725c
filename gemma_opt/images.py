"""A client's picture in: a data URI or an http(s) URL → a checked, upright RGB image.

The only place that decodes a stranger's bytes; those behind a URL come from `fetching`. Cog's own file
inputs would fetch any address, private ones included, without limit; so pictures arrive as strings and come through here.

Left out on purpose: plain paths and other schemes (a request must not read the server's files) and frames after the first.
The transparent colour of a 16-bit grey PNG is drawn like any other.
"""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import time
import zlib
from collections.abc import Callable, Generator
from urllib.parse import unquote
from weakref import WeakSet

from PIL import Image, ImageOps
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from gemma_opt.errors import ImageError
from gemma_opt.fetching import MAX_BYTES, STRICT, TOO_LARGE, FetchPolicy, fetch

MIN_SIDE, MAX_SIDE = 8, 8192
MAX_PIXELS = 40_000_000  # 160 MB decoded; above any phone's usual picture
MAX_ASPECT = 50  # beyond it the model's square input shows nothing
DECODE_TIMEOUT_S = 10.0
DECODED_AT_ONCE = 2  # by all requests together: a picture takes up to 160 MB, and two to three times that while it is converted
TURN_POLL_S = 0.005  # a small picture is decoded in about that time
SOURCES = "a data URI (data:image/png;base64,…) or an http(s) URL"
FORMATS = "PNG, JPEG, WEBP or GIF"
LIMITS = f"sides of {MIN_SIDE} to {MAX_SIDE} pixels, {MAX_PIXELS // 10**6} megapixels, an aspect ratio of {MAX_ASPECT}"

# Decoding

# What Pillow 13 raises for bytes that are not what they claim to be; its texts hold heap addresses.
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip

# The readers themselves, not Image.open: that warns, through the process's filters, about sizes we are about to refuse,
# and reads the second picture of a JPEG that has one.
_READERS: dict[bytes, type[ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": JpegImageFile, b"RIFF": WebPImageFile, b"GIF8": GifImageFile,
}  # fmt: skip


class _TimedBytes(io.BytesIO):
    """Bytes that stop coming after a while.

    A few megabytes can cost Pillow an hour: a JPEG may hold 100,000 scans, each a walk over the whole picture, or as many
    EXIF segments, each copied onto all before it. Pillow reads between such steps, so this ends them.
    """

    def __init__(self, data: bytes, timeout_s: float) -> None:
        super().__init__(data)
        self._ends_at = time.monotonic() + timeout_s

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self._ends_at:
            raise TimeoutError
        return super().read(size)


def decode_image(
    data: bytes, timeout_s: float = DECODE_TIMEOUT_S, while_waiting: Callable[[], None] = lambda: None
) -> Image.Image:
    """An encoded picture → its first frame: upright, on white where it was transparent, RGB, without metadata.

    Size and shape are checked before any pixel is decoded. while_waiting: called again and again until it is this picture's
    turn; what it raises ends the wait. Raises ImageError (E1010).
    """
    if len(data) > MAX_BYTES:
        raise ImageError(TOO_LARGE)
    reader = next((reader for magic, reader in _READERS.items() if data.startswith(magic)), None)
    if reader is None:
        raise ImageError(f"not a picture: {FORMATS} is needed")
    with _turn_to_decode(while_waiting):
        return _decode(reader, data, timeout_s)


class _Turn:
    """Someone's turn to decode. It counts while anyone keeps it."""


_turns: WeakSet[_Turn] = WeakSet()  # no semaphore: a cancel may strike between any two lines, and a lost release stays lost


@contextlib.contextmanager
def _turn_to_decode(while_waiting: Callable[[], None]) -> Generator[None]:
    turn = _Turn()
    _turns.add(turn)
    while len(_turns) > DECODED_AT_ONCE:
        _turns.discard(turn)
        time.sleep(TURN_POLL_S)
        while_waiting()
        _turns.add(turn)
    try:
        yield
    finally:
        _turns.discard(turn)


def _decode(reader: type[ImageFile], data: bytes, timeout_s: float) -> Image.Image:
    try:
        picture = reader(_TimedBytes(data, timeout_s))
        _check_size(*picture.size)
        picture.decodermaxblock = 1024  # so that a hostile JPEG looks at the clock every few scans
        picture.load()
        _turn_upright_(picture)
        return _to_rgb(picture)
    except _DAMAGE:
        raise ImageError("the picture is damaged, incomplete or of an unusual kind and cannot be decoded") from None


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short < MIN_SIDE or long > MAX_SIDE or width * height > MAX_PIXELS or long > MAX_ASPECT * short:
        raise ImageError(f"the picture is {width} × {height} pixels; allowed are {LIMITS}")


def _turn_upright_(picture: ImageFile) -> None:
    """Apply the EXIF orientation. Pillow turns the pixels before it rewrites the EXIF data, so broken data costs nothing."""
    with contextlib.suppress(*_DAMAGE):
        ImageOps.exif_transpose(picture, in_place=True)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        picture.info.pop("transparency", None)
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        rgb = Image.new("RGB", layer.size, "white")
        rgb.paste(layer, mask=layer)
    else:
        rgb = picture.convert("RGB")
    rgb.info.clear()
    return rgb


# Any source


def load_image(source: str, policy: FetchPolicy = STRICT, while_waiting: Callable[[], None] = lambda: None) -> Image.Image:
    """A client's picture as RGB: `source` is SOURCES.

    while_waiting: see `decode_image`. Fetching takes at most `policy.timeout_s`, and no wait in it is longer than
    `fetching.POLL_S`. Raises ImageError (E1010) for what is not a picture within LIMITS, ImageFetchError (E1011), always with
    the same text, for all network causes.
    """
    source = source.strip()
    scheme = source[:8].partition(":")[0].lower()
    if scheme == "data":
        return decode_image(_parse_data_uri(source), while_waiting=while_waiting)
    if scheme in ("http", "https"):
        return decode_image(fetch(source, policy), while_waiting=while_waiting)
    raise ImageError(f"an image must be {SOURCES}")


def _parse_data_uri(uri: str) -> bytes:
    """The bytes of a base64 data URI. Its media type is not looked at: clients get it wrong, and the bytes say it better."""
    header, _, payload = uri.partition(",")
    if not header.lower().endswith(";base64"):
        raise ImageError("a data URI must be base64: data:image/png;base64,…")
    digits = "".join(unquote(payload).split()).rstrip("=")
    if len(digits) * 3 // 4 > MAX_BYTES:
        raise ImageError(TOO_LARGE)
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise ImageError("the data URI is not valid base64") from None
