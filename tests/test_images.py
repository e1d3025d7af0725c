"""Real pictures in every form, and real servers on 127.0.0.1 behind a policy that allows them."""

import base64
import ctypes
import io
import logging
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, ip_address
from itertools import count, takewhile
from pathlib import Path
from types import FrameType, MappingProxyType

import pytest
from PIL import Image, ImageOps

from gemma_opt import images
from gemma_opt.errors import ImageError, ImageFetchError
from gemma_opt.fetching import FETCH_FAILED, MAX_BYTES, FetchPolicy, IPAddress, is_public
from gemma_opt.images import decode_image, load_image

pytestmark = pytest.mark.timed

TraceFunction = Callable[[FrameType, str, object], object]
Page = Callable[[BaseHTTPRequestHandler], None]
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    """Red, with its upper left quarter blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1] // 2))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


def near(left: Image.Image, right: Image.Image, tolerance: int = 12) -> bool:
    """Whether two pictures are equal but for what a lossy format changes."""
    small = [image.resize((4, 2), Image.Resampling.BOX).tobytes() for image in (left, right)]
    pairs = zip(*small, strict=True)
    return (left.mode, left.size) == (right.mode, right.size) and all(abs(a - b) <= tolerance for a, b in pairs)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """A PNG with a true header and almost no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Decoding


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [("JPEG", mode) for mode in ("L", "RGB", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "RGBA")]
    + [("GIF", mode) for mode in ("L", "P")],
)
def test_every_format_and_mode_becomes_the_same_rgb(kind: str, mode: str) -> None:
    source = picture("L").convert("I").point(lambda value: value * 257).convert(mode) if mode == "I;16" else picture(mode)
    grey = mode in ("1", "L", "LA", "I;16")
    wanted = picture("1" if mode == "1" else "L").convert("RGB") if grey else picture()
    assert near(decode_image(encoded(source, kind)), wanted)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    source = Image.new("I;16", (8, 8), 0)
    for column, value in enumerate((0, 255, 257, 4000, 32768, 65278, 65535)):
        source.putpixel((column, 0), value)
    decoded = decode_image(encoded(source))
    assert [decoded.getpixel((column, 0)) for column in range(7)] == [(v, v, v) for v in (0, 0, 1, 15, 127, 254, 255)]


def test_a_transparent_colour_in_16_bit_grey_does_not_fail() -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)) + png_chunk(b"tRNS", b"\x9c\x40")
    rows = png_chunk(b"IDAT", zlib.compress((b"\0" + b"\x9c\x40" * 8) * 8)) + png_chunk(b"IEND", b"")
    assert decode_image(b"\x89PNG\r\n\x1a\n" + header + rows).getpixel((0, 0)) == (155, 155, 155)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(kind: str) -> None:
    source = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    source.paste((0, 0, 0, 128), (8, 0, 16, 16))
    decoded = decode_image(encoded(source, kind))
    assert decoded.getpixel((2, 8)) == WHITE
    assert decoded.getpixel((12, 8)) == (127, 127, 127)


def test_a_transparent_palette_entry_lies_on_white() -> None:
    source = picture("P", (16, 16))
    blue = source.getpixel((0, 0))
    for data in (
        encoded(source, "GIF", transparency=blue),
        encoded(source, "PNG", transparency=blue),
        encoded(source, "PNG", transparency=bytes(0 if index == blue else 255 for index in range(256))),
    ):
        decoded = decode_image(data)
        assert (decoded.getpixel((0, 0)), decoded.getpixel((12, 12))) == (WHITE, RED)


@pytest.mark.parametrize(("mode", "key"), [("RGB", BLUE), ("L", 29)])
def test_a_transparent_colour_lies_on_white(mode: str, key: object) -> None:
    assert decode_image(encoded(picture(mode), transparency=key)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_only_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (GREEN, RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data).getpixel((8, 8)) == GREEN


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    decoded = decode_image(data)
    assert decoded.tobytes() == wanted.tobytes()
    assert (decoded.size, decoded.info) == ((32, 64) if orientation > 4 else (64, 32), {})


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # production ignores what Pillow says about broken metadata
def test_broken_exif_does_not_fail_the_picture() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        for kind in ("JPEG", "PNG", "WEBP"):
            assert near(decode_image(encoded(picture(), kind, exif=exif)), picture())


def test_exif_that_cannot_be_rewritten_still_turns_the_picture() -> None:
    """A description that is a number: Pillow cannot write it back, but the picture is upright by then."""
    entries = struct.pack(">HHII", 0x010E, 5, 1, 38) + struct.pack(">HHII", 0x0112, 3, 1, 6 << 16)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + b"\0\0\0\0" + struct.pack(">II", 1, 2)
    data = encoded(picture(), "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as opened, pytest.raises(AttributeError):
        ImageOps.exif_transpose(opened)
    assert decode_image(data).size == (32, 64)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_a_truncated_file_is_refused_in_words_without_addresses(kind: str, kept: float) -> None:
    data = encoded(Image.effect_noise((64, 64), 50), kind)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: int(len(data) * kept)])
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello, I am a text", b"<svg/>", b"BM" + b"\0" * 100, b"RIFF....AVI "])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^E1010 "):
        decode_image(data)


@pytest.mark.parametrize(
    "size", [(7, 100), (100, 7), (8193, 400), (400, 8193), (9000, 10), (8192, 4883), (8, 401), (60000, 60000), (10000, 9000)]
)
def test_sizes_beyond_the_limits_are_refused_before_any_pixel(size: tuple[int, int]) -> None:
    """None of these files holds its pixels. 10000 × 9000 is where Pillow would warn."""
    width, height = size
    with pytest.raises(ImageError, match=f"{width} × {height} pixels; allowed are .*8 to 8192"):
        decode_image(png_claiming(width, height))


@pytest.mark.parametrize("size", [(8, 8), (8, 400), (8192, 164)])
def test_sizes_at_the_limits_are_accepted(size: tuple[int, int]) -> None:
    assert decode_image(encoded(picture(size=size))).size == size


def test_a_gif_frame_larger_than_its_screen_is_refused() -> None:
    data = bytearray(encoded(picture("P"), "GIF"))
    frame = data.rindex(b"," + struct.pack("<HHHH", 0, 0, 64, 32))
    for claim in ((9000, 100), (10000, 9000), (60000, 60000)):
        data[frame + 5 : frame + 9] = struct.pack("<HH", *claim)
        with pytest.raises(ImageError):
            decode_image(bytes(data))


def test_inflating_text_in_a_png_is_refused() -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b" " * 50_000_000))
    data = encoded(picture())
    with pytest.raises(ImageError):
        decode_image(data[:33] + bomb + data[33:])


def test_a_jpeg_that_would_take_an_hour_ends_with_the_clock() -> None:
    """100,000 scans in 6 MB, each a walk over 40 megapixels: Pillow alone needs 40 minutes for it."""
    data = encoded(Image.new("L", (6400, 6240), 128), "JPEG", progressive=True)
    scans = [match.start() for match in re.finditer(b"\xff\xda", data)]
    scan = data[scans[3] : scans[4]].partition(b"\xff\xc4")[0]
    start = time.monotonic()
    with pytest.raises(ImageError):
        decode_image(data[: scans[3]] + scan * 100_000 + data[scans[3] :], timeout_s=0.5)
    assert time.monotonic() - start < 5


# Sources


@pytest.mark.parametrize("head", ["data:image/png", "data:", "DATA:image/jpeg", "data:text/plain;charset=utf-8", "  data:x"])
def test_data_uris_are_read_whatever_they_call_themselves(head: str) -> None:
    assert load_image(uri(encoded(picture()), head + ";Base64,")).tobytes() == picture().tobytes()


def test_base64_may_be_wrapped_escaped_or_unpadded() -> None:
    digits = base64.b64encode(encoded(picture())).decode()
    wrapped = "\r\n".join(digits[start : start + 76] for start in range(0, len(digits), 76))
    escaped = digits.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for payload in (wrapped, escaped, digits.rstrip("="), digits + "\n"):
        assert load_image("data:image/png;base64," + payload).size == (64, 32)


@pytest.mark.parametrize(
    "rest", ["", "image/png;base64", "image/png,abc", ";base64,", ";base64,%%%", ";base64,é\ud800", ";base64,a"]
)
def test_bad_data_uris_are_refused(rest: str) -> None:
    with pytest.raises(ImageError, match=r"^E1010 "):
        load_image("data:" + rest)


def test_a_data_uri_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="larger than 10 MB"):
        load_image("data:;base64," + "A" * (MAX_BYTES * 4 // 3 + 4))


@pytest.mark.parametrize(
    "source", ["", " ", "/etc/passwd", "picture.png", "file:///etc/passwd", "ftp://a/b.png", "gopher://a", "aGVsbG8="]
)
def test_other_sources_are_refused_with_what_is_allowed(source: str) -> None:
    with pytest.raises(ImageError, match=r"^E1010 .*data URI.*https?\(s\) URL$"):
        load_image(source)


# Addresses


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


NOT_PUBLIC = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "255.255.255.255",
    "224.0.0.1", "240.0.0.1", "198.18.0.1", "192.0.0.192", "168.63.129.16", "::", "::1", "fe80::1", "fd00:ec2::254",
    "fec0::1", "ff02::1", "ff0e::1", "2001:db8::1", "::7f00:1", "64:ff9b:1::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:808:808::1", "2001:0:7f00:1::", "2001::808:808",
]  # fmt: skip


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses(address: str) -> None:
    assert not is_public(ip_address(address))


# Fetching


def page(status: int = 200, body: bytes = b"", headers: Mapping[str, str] = MappingProxyType({})) -> Page:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


class Site:
    """A web server on 127.0.0.1: `pages` maps paths to answers, `seen` holds each request's path and headers."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append((self.path, dict(self.headers)))
                try:
                    site.pages[self.path](self)
                except OSError:  # the client went away, as several tests want it to
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def url(self, path: str, host: str = "pictures.test", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def __enter__(self) -> "Site":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def local(port: int, hosts: Mapping[str, list[str]] = MappingProxyType({}), timeout_s: float = 5.0) -> FetchPolicy:
    """127.0.0.1 is allowed on one port; every name leads there unless `hosts` says otherwise."""

    def allowed(address: IPAddress) -> bool:
        return address == IPv4Address("127.0.0.1")

    def find(host: str, port: int) -> list[str]:
        return hosts.get(host, ["127.0.0.1"])

    return FetchPolicy(timeout_s=timeout_s, ports=frozenset({port}), is_allowed=allowed, resolve=find)


def assert_unfetched(source: str, policy: FetchPolicy | None = None) -> None:
    with pytest.raises(ImageFetchError) as caught:
        load_image(source, policy or FetchPolicy())
    assert str(caught.value) == f"E1011 {FETCH_FAILED}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_picture_is_fetched_by_name(site: Site) -> None:
    site.pages["/a%20b.png?size=1"] = page(body=encoded(picture()))
    assert load_image(site.url("/a b.png?size=1#top"), local(site.port)).tobytes() == picture().tobytes()
    [(_, headers)] = site.seen
    assert headers["Host"] == f"pictures.test:{site.port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


def test_a_name_is_resolved_exactly_once(site: Site) -> None:
    """DNS rebinding: a second look-up would give another address than the one that was checked."""
    site.pages["/"] = page(body=encoded(picture()))
    answers = [["127.0.0.1"], ["127.0.0.2"]]
    policy = local(site.port)
    load_image(site.url("/"), FetchPolicy(ports=policy.ports, is_allowed=policy.is_allowed, resolve=lambda *_: answers.pop(0)))
    assert answers == [["127.0.0.2"]]


def test_one_address_that_is_not_allowed_is_enough(site: Site) -> None:
    site.pages["/"] = page(body=encoded(picture()))
    for answer in (["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], []):
        assert_unfetched(site.url("/", "mixed.test"), local(site.port, {"mixed.test": answer}))
    assert site.seen == []


def test_a_dead_address_does_not_keep_from_the_living(site: Site) -> None:
    site.pages["/"] = page(body=encoded(picture()))
    policy = local(site.port)
    policy = FetchPolicy(ports=policy.ports, is_allowed=lambda _: True, resolve=lambda *_: ["127.0.0.9", "127.0.0.1"])
    assert load_image(site.url("/"), policy).size == (64, 32)


def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    site.pages["/"] = page(body=encoded(picture()))
    assert load_image(site.url("/"), local(site.port)).size == (64, 32)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site: Site, status: int) -> None:
    site.pages["/a/1"] = page(status, headers={"Location": "2"})
    site.pages["/a/2"] = page(status, headers={"Location": site.url("/3", "other.test")})
    site.pages["/3"] = page(status, headers={"Location": f"//third.test:{site.port}/4"})
    site.pages["/4"] = page(body=encoded(picture()))
    assert load_image(site.url("/a/1"), local(site.port)).size == (64, 32)


def test_a_fourth_redirect_and_a_loop_are_refused(site: Site) -> None:
    site.pages["/loop"] = page(302, headers={"Location": "/loop"})
    assert_unfetched(site.url("/loop"), local(site.port))
    assert len(site.seen) == 4


BAD_REDIRECTS = [
    "http://inner.test:{port}/secret", "http://10.0.0.1:{port}/", "http://[::1]:{port}/", "http://pictures.test:1/",
    "http://me:pw@pictures.test:{port}/secret", "ftp://pictures.test:{port}/", "file:///etc/passwd", "http://[bad", "//[",
]  # fmt: skip


@pytest.mark.parametrize("target", BAD_REDIRECTS)
def test_redirects_are_checked_like_the_first_url(site: Site, target: str) -> None:
    site.pages["/"] = page(302, headers={"Location": target.format(port=site.port)})
    site.pages["/secret"] = page(body=encoded(picture()))
    hosts = {"inner.test": ["192.168.0.1"], "10.0.0.1": ["10.0.0.1"], "::1": ["::1"]}
    assert_unfetched(site.url("/"), local(site.port, hosts))
    assert [path for path, _ in site.seen] == ["/"]


@pytest.mark.parametrize(
    "answer",
    [
        *(page(status, encoded(picture())) for status in (201, 204, 206, 400, 401, 404, 418, 500, 503)),
        page(302),
        page(body=encoded(picture()), headers={"Content-Encoding": "gzip"}),
        page(body=encoded(picture()), headers={"Content-Encoding": "br, identity"}),
        page(body=encoded(picture()), headers={"Content-Length": "100000"}),
        page(body=encoded(picture()), headers={"Content-Length": "many"}),
        page(body=b"zz\r\n", headers={"Transfer-Encoding": "chunked"}),
        page(headers={"X-Long": "x" * 200_000}),
        lambda handler: None,
        lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n"),
    ],
)  # fmt: skip
def test_answers_that_are_no_picture_all_look_alike(site: Site, answer: Page) -> None:
    site.pages["/"] = answer
    assert_unfetched(site.url("/"), local(site.port, timeout_s=2))


def test_a_closed_port_and_an_unknown_name_look_the_same() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert_unfetched(f"http://pictures.test:{port}/", local(port))

    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert_unfetched("http://nowhere.test/", FetchPolicy(resolve=unknown))


def test_a_page_that_is_no_picture_is_an_image_error(site: Site) -> None:
    site.pages["/"] = page(body=b"<html>")
    with pytest.raises(ImageError, match="not a picture"):
        load_image(site.url("/"), local(site.port))


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_the_limit_is_not_read_to_its_end(site: Site, announced: bool) -> None:
    sent = 0

    def endless(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        page(headers={"Content-Length": str(MAX_BYTES + 1)} if announced else {})(handler)
        while not site.closing.is_set():
            sent += handler.wfile.write(b"\0" * 65536)

    site.pages["/"] = endless
    with pytest.raises(ImageError, match="larger than 10 MB"):
        load_image(site.url("/"), local(site.port))
    assert sent < 3 * MAX_BYTES


# Time


def drip(part: bytes) -> Page:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(100):
            handler.wfile.write(part)
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize("part", [b"X-A: b\r\n", b"\r\n\0", b""])
def test_slow_servers_meet_one_deadline(site: Site, part: bytes) -> None:
    """Headers, body or nothing in drops: each drop is in time, the whole is not."""
    site.pages["/"] = drip(part)
    start = time.monotonic()
    assert_unfetched(site.url("/"), local(site.port, timeout_s=0.4))
    assert 0.3 < time.monotonic() - start < 1.5


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fetch_threads() -> int:
    return sum(thread.name == "image-fetch" for thread in threading.enumerate())


def test_a_hanging_name_look_up_does_not_hold_the_caller() -> None:
    hang = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        hang.wait(20)
        return []

    wait_until(lambda: fetch_threads() == 0)
    start = time.monotonic()
    assert_unfetched("http://slow.test/", FetchPolicy(timeout_s=0.2, resolve=resolve))
    assert time.monotonic() - start < 1.5
    assert fetch_threads() == 1
    hang.set()
    wait_until(lambda: fetch_threads() == 0)


def test_hanging_threads_are_bounded() -> None:
    hang = threading.Event()
    calls: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        calls.append(host)
        hang.wait(20)
        return []

    wait_until(lambda: fetch_threads() == 0)
    policy = FetchPolicy(timeout_s=0.3, resolve=resolve)
    callers = [threading.Thread(target=assert_unfetched, args=("http://slow.test/", policy)) for _ in range(40)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(10)
    assert len(calls) == fetch_threads() == 32
    hang.set()
    wait_until(lambda: fetch_threads() == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_in_the_thread_reaches_the_caller_without_waiting() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise ZeroDivisionError

    start = time.monotonic()
    with pytest.raises(RuntimeError):
        load_image("http://slow.test/", FetchPolicy(resolve=resolve))
    assert time.monotonic() - start < 1
    wait_until(lambda: fetch_threads() == 0)


def test_an_exception_raised_in_the_waiting_thread_arrives_at_once(site: Site) -> None:
    """Cog cancels by raising in the thread that waits; what is left behind ends by itself."""

    class Cancelled(BaseException):
        pass

    outcome: list[tuple[type[BaseException], float]] = []

    def request() -> None:
        try:
            load_image(site.url("/"), local(site.port, timeout_s=2))
        except (Cancelled, ImageFetchError) as error:
            outcome.append((type(error), time.monotonic()))

    site.pages["/"] = drip(b"X-A: b\r\n")
    caller = threading.Thread(target=request)
    caller.start()
    wait_until(lambda: bool(site.seen))
    assert caller.ident is not None
    cancelled_at = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller.ident), ctypes.py_object(Cancelled))
    caller.join(5)
    [(kind, ended_at)] = outcome
    assert kind is Cancelled
    assert ended_at - cancelled_at < 0.5
    wait_until(lambda: fetch_threads() == 0, timeout_s=1.0)  # its next read finds the clock stopped


def test_a_cancel_between_any_two_lines_loses_no_turn_to_decode() -> None:
    """The story: a semaphore's release was lost that way, and after two of them every picture waited for ever."""

    class Cancelled(BaseException):
        pass

    def cancelled_at(line: int) -> bool:
        """Decode with a cancel at the n-th line of the module; False: there are fewer."""
        left = line

        def trace(frame: FrameType, event: str, _: object) -> TraceFunction | None:
            nonlocal left
            if frame.f_code.co_filename != images.__file__:
                return None
            left -= event == "line"
            if not left:
                raise Cancelled
            return trace

        sys.settrace(trace)
        try:
            decode_image(encoded(picture()))
        except Cancelled:
            return True
        finally:
            sys.settrace(None)
        return False

    def fail() -> None:
        raise AssertionError("nobody decodes any more")

    struck = sum(1 for _ in takewhile(cancelled_at, count(1)))
    assert struck > 20
    with ExitStack() as turns:
        for _ in range(images.DECODED_AT_ONCE):
            turns.enter_context(images._turn_to_decode(fail))  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(AssertionError, match="nobody decodes"):  # the turns are all taken
            turns.enter_context(images._turn_to_decode(fail))  # pyright: ignore[reportPrivateUsage]


# The default policy


PRIVATE_HOSTS = [
    "127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "0", "127.1", "2130706433",
    "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[fe80::1%25lo]", "127.0.0.1.", "127。0。0。1",
    "a" * 70, "a..b", "-", "%00", "xn--a", "[", "", " ", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_the_default_policy_refuses_private_hosts_in_every_spelling(host: str) -> None:
    assert_unfetched(f"http://{host}/latest/meta-data/")


@pytest.mark.parametrize(
    "url", ["http://1.1.1.1:22/", "https://1.1.1.1:8443/", "http://me:pw@1.1.1.1/", "http://me@1.1.1.1/", "http:x", "https:"]
)
def test_the_default_policy_refuses_odd_ports_and_credentials(url: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("refused before any name is looked up")

    assert_unfetched(url, FetchPolicy(resolve=resolve))


def test_the_log_tells_the_reason_without_the_query(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemma_opt.fetching")
    assert_unfetched("http://me:pw@127.0.0.1/a.png?token=secret")
    assert_unfetched("http://127.0.0.1/a.png?token=secret#secret")
    assert "http://127.0.0.1/a.png: " in caplog.text
    assert "127.0.0.1 is at 127.0.0.1" in caplog.text
    assert "secret" not in caplog.text
    assert "pw" not in caplog.text


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for pictures.test that signs itself, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command makes the certificate, and there is none here")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=pictures.test", "-addext", "subjectAltName=DNS:pictures.test"]
    command = [openssl, "req", "-x509", *kind, *name, "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_tls_checks_the_name_not_the_address(certificate: Path) -> None:
    names: list[str | None] = []

    def note_name(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        names.append(name)

    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    serving.sni_callback = note_name
    trusting = ssl.create_default_context(cafile=str(certificate))
    with Site(serving) as site:
        site.pages["/"] = page(body=encoded(picture()))
        base = local(site.port)
        policy = FetchPolicy(ports=base.ports, is_allowed=base.is_allowed, resolve=base.resolve, tls=lambda: trusting)
        assert load_image(site.url("/", scheme="https"), policy).size == (64, 32)
        assert names == ["pictures.test"]
        assert_unfetched(site.url("/", "other.test", "https"), policy)
        assert_unfetched(site.url("/", scheme="https"), base)
        assert len(site.seen) == 1
