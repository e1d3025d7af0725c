"""A URL of a client's picture → its bytes, from public web servers only: the one place that opens connections for requests.

Every host name is resolved once, every address checked, and the connection goes to what was checked; one clock runs over
all of it. Whatever goes wrong on the network is one error with one text, so that nobody maps private networks with it.

Left out on purpose: environment proxies (they would resolve names where we cannot check the addresses), content encodings
(a bomb for no gain: pictures are compressed), cookies and credentials.

The caller's thread only ever waits in steps of POLL_S, so an exception that Cog raises in it (a cancel) arrives at once.
The thread it leaves behind does the network work and ends with the fetch's own clock.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from queue import Empty, SimpleQueue

import httpcore
import httpx

from gemma_opt.errors import ImageError, ImageFetchError

log = logging.getLogger(__name__)

MAX_BYTES = 10_000_000  # of an encoded picture, wherever it comes from
MAX_FETCHES = 32  # threads: one whose name look-up hangs outlives its request by up to a minute
POLL_S = 0.05  # how long a cancel may wait
FETCH_FAILED = "the image could not be fetched: the URL must lead to a picture on a public web server that answers in time"
TOO_LARGE = f"the image is larger than {MAX_BYTES // 10**6} MB"

_THREAD_NAME = "image-fetch"
_starting = threading.Lock()


# Addresses

IPAddress = IPv4Address | IPv6Address

_UNICAST_IPV6 = IPv6Network("2000::/3")  # all that is handed out; the rest is local, reserved or wraps IPv4
_NAT64 = IPv6Network("64:ff9b::/96")  # how IPv6-only machines reach IPv4: the last four bytes are the address
_TUNNELS = (IPv6Network("2001::/32"), IPv6Network("2002::/16"))  # Teredo, 6to4: dead, and they wrap IPv4 addresses
_CLOUD_AGENTS = (
    IPv4Network("168.63.129.16"),
    IPv4Network("192.0.0.0/24"),
)  # Azure's, Oracle's: metadata at public-looking places


def is_public(address: IPAddress) -> bool:
    """Whether an address is an ordinary one on the public internet, also seen through IPv6 forms that wrap IPv4."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped or address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _UNICAST_IPV6 or any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOUD_AGENTS)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host name, in the system's order. Raises OSError. May block for as long as the resolver likes."""
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@functools.cache
def public_certificates() -> ssl.SSLContext:
    """TLS with the certificate authorities that httpx brings; SSL_CERT_FILE and its like are not read."""
    return httpx.create_ssl_context(trust_env=False)


@dataclass(frozen=True)
class FetchPolicy:
    """Where a picture may be fetched from, and how long that may take. The default is the service's; the rest is for tests."""

    timeout_s: float = 10.0  # over everything: name look-up, every redirect, the last byte
    max_redirects: int = 3
    ports: frozenset[int] = frozenset({80, 443})
    is_allowed: Callable[[IPAddress], bool] = is_public
    resolve: Callable[[str, int], list[str]] = resolve
    tls: Callable[[], ssl.SSLContext] = public_certificates


STRICT = FetchPolicy()


# Fetching


class _Refused(Exception):
    """Why a fetch failed: for the log, never for the client."""


# Every other way in which a fetch fails; ValueError: what ssl, socket and urllib say to impossible host names.
_NETWORK_ERRORS = (
    httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, httpx.InvalidURL, OSError, ValueError,
)  # fmt: skip


_HEADERS = ((b"User-Agent", b"gemma-opt"), (b"Accept", b"image/*"), (b"Accept-Encoding", b"identity"))


class _Clock:
    """The time one fetch has left, for the thread that waits and the thread that works."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, above 0. Raises _Refused when there are none."""
        left = self._ends_at - time.monotonic()
        if left <= 0:
            raise _Refused("out of time")
        return left

    def stop(self) -> None:
        self._ends_at = 0.0


class _TimedStream(httpcore.NetworkStream):
    """A connection on which every wait ends with the clock: a peer that drips cannot start a new time-out with each byte."""

    def __init__(self, stream: httpcore.NetworkStream, clock: _Clock) -> None:
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left_s())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left_s())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, self._clock.left_s()), self._clock)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class _CheckedNetwork(httpcore.NetworkBackend):
    """Resolves a name once, checks every address, connects to what was checked: a second look-up could answer otherwise.

    Host header, server name and certificate check stay with the name, because httpcore above this only knows the name.
    """

    def __init__(self, policy: FetchPolicy, clock: _Clock) -> None:
        self._policy = policy
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._policy.resolve(host, port)
        refused = [address for address in addresses if not self._policy.is_allowed(ip_address(address))]
        if refused:
            raise _Refused(f"{host} is at {', '.join(refused)}")
        for remaining, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                share_s = self._clock.left_s() / remaining  # an address that swallows packets must not use up the time
                return _TimedStream(httpcore.SyncBackend().connect_tcp(address, port, share_s), self._clock)
        raise _Refused(f"{host} takes no connection at {', '.join(addresses) or 'any address'}")


def _download(source: str, policy: FetchPolicy, clock: _Clock) -> bytes:
    url = httpx.URL(source)
    with httpcore.ConnectionPool(ssl_context=policy.tls(), network_backend=_CheckedNetwork(policy, clock)) as pool:
        for _ in range(policy.max_redirects + 1):
            _check_url(url, policy)
            # In parts, as httpx does it: a text would be parsed once more, by other rules.
            target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
            with pool.stream("GET", target, headers=[(b"Host", url.netloc), *_HEADERS]) as response:
                location = httpx.Headers(response.headers).get("location")
                if response.status not in (301, 302, 303, 307, 308) or location is None:
                    return _read_body(response)
            url = url.join(location)
    raise _Refused(f"more than {policy.max_redirects} redirects")


def _check_url(url: httpx.URL, policy: FetchPolicy) -> None:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    if port not in policy.ports or url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise _Refused("a scheme, port or user name that is not allowed, or no host")


def _read_body(response: httpcore.Response) -> bytes:
    headers = httpx.Headers(response.headers)
    if response.status != 200:
        raise _Refused(f"status {response.status}")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _Refused("content encoding")
    if int(headers.get("content-length", "0")) > MAX_BYTES:
        raise ImageError(TOO_LARGE)
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise ImageError(TOO_LARGE)
    return bytes(body)


def fetch(source: str, policy: FetchPolicy) -> bytes:
    """The bytes behind a URL. Raises ImageFetchError with one text for all causes, ImageError for too many bytes."""
    clock = _Clock(policy.timeout_s)
    outcome: SimpleQueue[bytes | Exception | None] = SimpleQueue()

    def work() -> None:
        result = None  # stays None if we have a defect; threading writes its traceback
        try:
            result = _download(source, policy, clock)
        except (ImageError, _Refused, *_NETWORK_ERRORS) as error:
            result = error
        finally:
            outcome.put(result)

    try:
        _start(work, clock)
        result = _wait(outcome, clock)
    except _Refused as refused:
        result = refused
    finally:
        clock.stop()
    if isinstance(result, bytes):
        return result
    if isinstance(result, ImageError):
        raise result
    if result is None:
        raise RuntimeError("the thread that fetches an image died of a defect")
    log.info("no image from %s: %s: %s", _without_query(source), type(result).__name__, result)
    raise ImageFetchError(FETCH_FAILED)


def _start(work: Callable[[], None], clock: _Clock) -> None:
    """Run `work` on a thread as soon as fewer than MAX_FETCHES run.

    They are counted, not kept by a semaphore: a cancel may strike between any two lines, and a lost release stays lost.
    """
    while True:
        with _starting:
            if sum(thread.name == _THREAD_NAME for thread in threading.enumerate()) < MAX_FETCHES:
                threading.Thread(target=work, name=_THREAD_NAME, daemon=True).start()
                return
        time.sleep(min(POLL_S, clock.left_s()))


def _wait(outcome: SimpleQueue[bytes | Exception | None], clock: _Clock) -> bytes | Exception | None:
    while True:
        with contextlib.suppress(Empty):
            return outcome.get(timeout=min(POLL_S, clock.left_s()))


def _without_query(source: str) -> str:
    """What of a URL may stand in a log."""
    try:
        url = httpx.URL(source)
    except (httpx.InvalidURL, ValueError):
        return "an invalid URL"
    return f"{url.scheme}://{url.netloc.decode('ascii')}{url.raw_path.partition(b'?')[0].decode('ascii')}"[:200]
