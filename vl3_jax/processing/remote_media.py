"""Fetches images and videos from http(s):// addresses: the one policy for questions and data sets.

Nothing is fetched unless a person asked for it (`--allow-remote`, `allow_remote=True`, a data set's `remote: true`).
Then this is the way:

    policy = RemotePolicy()
    content = fetch("https://example.org/a.png", policy)       # MediaBytes, which every reader accepts
    source = fetched(source, policy)                           # the same where a source is remote; else unchanged

An address may come from a stranger, so a fetch never reaches what the stranger could not: the name is resolved once,
every address it has must be public, and the connection goes to the address that was checked. Redirects are checked in
the same way. Size and time are limited. Proxies of the environment are not used, because behind a proxy no address can
be checked.
"""

import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from vl3_jax.errors import InputError, printable
from vl3_jax.processing.media_source import MediaBytes, scheme_of

REMOTE_SCHEMES = ("http", "https")
_CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 2**16
_IN_URL = "!#$%&'()*+,/:;=?@[]~"  # what stays as it is when an address is written for the request
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address
_SITE_LOCAL = ipaddress.ip_network("fec0::/10")


def _resolve(host: str, port: int) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


@dataclasses.dataclass(frozen=True)
class RemotePolicy:
    """What may be fetched from other machines, and how.

    Attributes:
      max_bytes: Largest content of one address.
      seconds: Longest time for one address, redirects included.
      max_redirects: Most redirects of one address.
      resolve: Returns the IP addresses of a host and port.
      connect: Opens a connection to an (IP address, port) within a timeout in seconds.
    """

    max_bytes: int = 2**28
    seconds: float = 60.0
    max_redirects: int = 5
    resolve: Callable[[str, int], list[str]] = _resolve
    connect: Callable[[tuple[str, int], float], socket.socket] = socket.create_connection


def is_remote(source: Any) -> bool:
    """Returns whether a source is an address on another machine."""
    return scheme_of(source) in REMOTE_SCHEMES


def fetched(source: Any, policy: RemotePolicy | None) -> Any:
    """Returns a source, and in a list each of its sources, with addresses replaced by their content.

    Args:
      source: Any source of an image or video.
      policy: How to fetch; None fetches nothing, so that readers refuse the address.

    Raises:
      InputError: An address that the policy forbids, or that cannot be fetched.
    """
    if policy is None:
        return source
    if isinstance(source, list | tuple):
        return [fetched(item, policy) for item in source]
    return fetch(source, policy) if is_remote(source) else source


def fetch(url: str, policy: RemotePolicy) -> MediaBytes:
    """Fetches the content of an http(s):// address.

    Raises:
      InputError: The address, or one that it redirects to, is not public or not http(s); it does not answer, answers
        with an error or a web page, or its content is larger or slower than the policy allows.
    """
    name, target = printable(url), url
    deadline = _Deadline(policy.seconds)
    try:
        with deadline:
            for _ in range(policy.max_redirects + 1):
                content = _fetch_once(name, target, policy, deadline)
                if isinstance(content, bytes):
                    return MediaBytes(content, url)
                target = urllib.parse.urljoin(target, content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if deadline.passed:
            raise InputError(f"{name}: not fetched within {policy.seconds:g} s; download it yourself") from None
        raise InputError(f"{name}: cannot be fetched ({_reason(error)}); check the address") from None
    raise InputError(f"{name}: redirected more than {policy.max_redirects} times; give the address of the file itself")


def is_public(address: str) -> bool:
    """Returns whether an IP address belongs to the open internet: not to this machine, a local network or a group."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip in _SITE_LOCAL or ip.scope_id:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Deadline:
    """Shuts down the connections opened while it is active once the time is over, however slowly bytes come."""

    def __init__(self, seconds: float):
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()

    def watch(self, connection: socket.socket) -> None:
        self._sockets.append(connection)
        if self.passed:
            self._end()

    def _end(self) -> None:
        self.passed = True
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _fetch_once(name: str, url: str, policy: RemotePolicy, deadline: _Deadline) -> bytes | str:
    """Returns the content of an address, or the address that it redirects to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in REMOTE_SCHEMES or not parts.hostname:
        raise InputError(f"{name}: leads to {printable(url)}, which is no http(s):// address; give that of a file")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{name}: holds a user name or password; leave them out")
    host, port = _ascii_host(parts.hostname), parts.port or _CONNECTIONS[parts.scheme].default_port
    with _connection(name, parts.scheme, host, port, policy, deadline) as connection:
        target = urllib.parse.quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_IN_URL)
        connection.request("GET", target, headers={"User-Agent": "vl3_jax", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and response.headers.get("Location"):
            return response.headers["Location"]
        if response.status != http.client.OK:
            raise InputError(f"{name}: the server answers {response.status} {response.reason}; check the address")
        if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise InputError(f"{name}: is a web page, not an image or video; give the address of the file itself")
        return _content(name, response, policy, deadline)


def _content(name: str, response: http.client.HTTPResponse, policy: RemotePolicy, deadline: _Deadline) -> bytes:
    expected, content = response.length, bytearray()  # None: until the end of the connection, or of the chunks
    ended = False
    while not ended and len(content) != expected:
        if max(expected or 0, len(content)) > policy.max_bytes:
            raise InputError(f"{name}: larger than {policy.max_bytes:,} bytes; download it and give the file")
        piece = response.read1(_PIECE)
        content += piece
        ended = not piece
    if deadline.passed or len(content) < (expected or 0):
        raise ConnectionError("the connection ended before the content did")
    if not content:
        raise InputError(f"{name}: the content is empty (0 bytes); check the address")
    return bytes(content)


@contextlib.contextmanager
def _connection(
    name: str, scheme: str, host: str, port: int, policy: RemotePolicy, deadline: _Deadline
) -> Iterator[http.client.HTTPConnection]:
    """Connects to a host that has public addresses only, through one of those that were checked."""
    addresses = policy.resolve(host, port)
    for address in addresses:
        if not is_public(address):
            raise InputError(f"{name}: {host} is at {address}, which is not public; give a public address or a file")
    stream = _first_to_answer(addresses, port, policy)
    connection = _CONNECTIONS[scheme](host, port)
    try:
        deadline.watch(stream)
        if scheme == "https":
            context = ssl.create_default_context()
            stream = context.wrap_socket(stream, server_hostname=host, do_handshake_on_connect=False)
            deadline.watch(stream)
            stream.do_handshake()
        connection.sock = stream
        yield connection
    finally:
        connection.close()
        stream.close()


def _first_to_answer(addresses: list[str], port: int, policy: RemotePolicy) -> socket.socket:
    error: OSError = OSError("the host has no address")
    for address in addresses:
        try:
            return policy.connect((address, port), policy.seconds / len(addresses))
        except OSError as failure:
            error = failure
    raise error


def _ascii_host(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
