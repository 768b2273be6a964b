"""Fetching from other machines: only when asked for, only public addresses, within limits of size, time, redirects."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from vl3_jax.errors import InputError
from vl3_jax.processing.media_source import MediaBytes
from vl3_jax.processing.remote_media import RemotePolicy, fetch, fetched, is_public, is_remote

CONTENT = b"\x89PNG" * 5000
PUBLIC = "93.184.215.14"
ADDRESSES = {"example.org": [PUBLIC], "rebind.example": ["127.0.0.1"], "mixed.example": [PUBLIC, "10.0.0.1"]}


class Server(http.server.BaseHTTPRequestHandler):
    """Answers by path; the host is whatever the client believes to talk to."""

    protocol_version = "HTTP/1.1"
    requests: list[str]

    def do_GET(self):
        self.requests.append(f"{self.headers['Host']}{self.path}")
        with contextlib.suppress(OSError):
            getattr(self, f"send_{self.path[1:].partition('/')[0]}", self.send_missing)()

    def answer(self, status=200, content=CONTENT, kind="image/png", **headers):
        self.send_response(status)
        for name, value in {"Content_Type": kind, "Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def send_image(self):
        self.answer()

    def send_chunks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in (CONTENT[:7], CONTENT[7:], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def send_missing(self):
        self.answer(404, b"no")

    def send_page(self):
        self.answer(kind="text/html; charset=utf-8")

    def send_empty(self):
        self.answer(content=b"")

    def send_to(self):
        self.answer(302, b"", Location=self.path.removeprefix("/to/"))

    def send_round(self):
        self.answer(301, b"", Location="/round")

    def send_cut(self):
        self.answer(Content_Length=len(CONTENT) + 1)
        self.close_connection = True

    def send_claim(self):
        self.answer(Content_Length=10**15)

    def send_endless(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(CONTENT)

    def send_drip(self):
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(b".")
            time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    Server.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def policy(server):
    """A policy whose names are invented and whose connections all lead to the server."""
    Server.requests.clear()

    def connect(address, timeout):
        assert is_public(address[0])
        return socket.create_connection(server.server_address, timeout)

    def resolve(host, port):
        return ADDRESSES.get(host) or [host]

    return RemotePolicy(max_bytes=10**6, seconds=5, resolve=resolve, connect=connect)


@pytest.mark.parametrize("path", ["image", "chunks", "to//image", "to/http://example.org:8080/image"])
def test_the_content_of_a_public_address(policy, path):
    url = f"http://example.org/{path}"
    assert fetch(url, policy) == MediaBytes(CONTENT, url)
    assert Server.requests[0] == f"example.org/{path}"


def test_unusual_characters_are_escaped_for_the_server(policy):
    with pytest.raises(InputError, match="answers 404"):
        fetch("http://example.org/ö b%20?q=ä#part", policy)
    assert Server.requests == ["example.org/%C3%B6%20b%20?q=%C3%A4"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/image", "127.0.0.1, which is not public"),
        ("http://[::1]/image", "::1, which is not public"),
        ("http://rebind.example/image", "rebind.example is at 127.0.0.1, which is not public"),
        ("http://mixed.example/image", "mixed.example is at 10.0.0.1"),
        ("http://example.org/to/http://169.254.169.254/latest", "169.254.169.254, which is not public"),
        ("http://example.org/to/http://rebind.example/image", "which is not public"),
        ("http://example.org/to/file:///etc/passwd", "no http"),
        ("http://example.org/round", "redirected more than 5 times"),
        ("http://me:secret@example.org/image", "leave them out"),
        ("http://example.org/nothing", "answers 404"),
        ("http://example.org/page", "is a web page"),
        ("http://example.org/empty", "is empty"),
        ("http://example.org/cut", "ended before the content did"),
        ("http://example.org/claim", "larger than 1,000,000 bytes"),
        ("http://example.org/endless", "larger than 1,000,000 bytes"),
        ("http://example.org:99999/image", "cannot be fetched"),
        ("http:///image", "no http"),
    ],
)
def test_what_the_policy_refuses_is_one_line_with_the_address(policy, url, message):
    with pytest.raises(InputError, match=message) as error:
        fetch(url, policy)
    assert str(error.value).startswith(f"{url}: ")


def test_bytes_that_drip_end_with_the_time(policy):
    short = RemotePolicy(policy.max_bytes, 0.3, resolve=policy.resolve, connect=policy.connect)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"not fetched within 0\.3 s"):
        fetch("http://example.org/drip", short)
    assert time.monotonic() - started < 3


def test_a_host_without_address_is_one_line():
    def resolve(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    with pytest.raises(InputError, match=r"cannot be fetched \(Name or service not known\)"):
        fetch("https://nowhere.example/a.png", RemotePolicy(resolve=resolve))


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1"),
        *("::", "::1", "::ffff:127.0.0.1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1"),
        *("ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_only_remote_sources_are_fetched_and_only_when_asked_for(policy):
    sources = ["a.png", "10:22:33.mp4", "file:///a.png", b"bytes", None, 3]
    assert [fetched(source, policy) for source in sources] == sources
    assert not any(map(is_remote, sources))
    url = "HTTP://example.org/image"
    assert fetched(url, None) == url
    assert fetched([url, "a.png"], policy) == [MediaBytes(CONTENT, url), "a.png"]
