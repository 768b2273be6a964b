"""What a medium may be given as: paths of any name, references, bytes, open files, pipes; and what is refused."""

import base64
import io
import os
import threading

import numpy as np
import pytest
from PIL import Image

from vl3_jax.errors import InputError, printable
from vl3_jax.processing.media_source import MediaBytes, path_or_bytes, reopenable

CONTENT = bytes(range(256))


def read(source):
    data, name = path_or_bytes(source, "image", "image file", "a path or bytes")
    if isinstance(data, str):
        assert os.path.isabs(data) or data.startswith("./")
        with open(data, "rb") as file:
            data = file.read()
    return data, name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("10:22:33.mp4", "caf\udce9.png", "a b%20c.png", "data:x", "-v.png", "~", "http:"):
        (tmp_path / name).write_bytes(CONTENT)
    return tmp_path


@pytest.mark.parametrize("name", ["10:22:33.mp4", "caf\udce9.png", "a b%20c.png", "data:x", "-v.png", "~", "http:"])
def test_names_of_any_kind_are_paths(folder, name):
    assert read(name) == (CONTENT, printable(name))
    assert read(folder / name)[0] == read(str(folder / name))[0] == CONTENT


def test_references_are_read(folder):
    encoded = base64.b64encode(CONTENT).decode()
    for reference in (
        f"file://{folder}/a%20b%2520c.png",
        f"FILE://localhost{folder}/caf%e9.png",
        f"data:image/png;base64,{encoded}",
        f"data:;base64,{encoded.rstrip('=')}",
        f"DATA:image/png;base64,{encoded[:40]}\n{encoded[40:]}",
        "data:application/octet-stream," + "".join(f"%{byte:02x}" for byte in CONTENT),
    ):
        assert read(reference)[0] == CONTENT
    assert len(read(f"data:image/png;base64,{encoded}")[1]) <= 60


def test_bytes_and_open_files_are_read(folder):
    with open("~", "rb") as file:
        assert read(file) == (CONTENT, "~")
    for source in (CONTENT, bytearray(CONTENT), memoryview(CONTENT), io.BytesIO(CONTENT)):
        assert read(source) == (CONTENT, "image bytes")
    assert read(MediaBytes(CONTENT, "https://example.org/a.png")) == (CONTENT, "https://example.org/a.png")


def test_a_pipe_is_read_once(folder):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: (folder / "pipe").write_bytes(CONTENT * 5000))
    writer.start()
    held = reopenable("pipe", "image")
    writer.join()
    assert read(held) == read(held) == (CONTENT * 5000, "pipe")


def test_what_can_be_opened_again_stays_as_it_is(folder):
    with open("~", "rb") as file:
        held = reopenable(file, "image")
    assert read(held) == read(held) == (CONTENT, "~")
    image = Image.new("RGB", (2, 2))
    for source in ("~", folder / "~", f"file://{folder}/~", CONTENT, image, np.zeros(3), "", "a\0b", "x" * 10**6):
        assert reopenable(source, "image") is source
    assert reopenable(("~", image), "video") == ["~", image]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.png", "nothing.png: no such image file"),
        ("~/nothing.png", "no such image file"),
        ("~/..", "no such image file"),
        ("", "the image has an empty name"),
        ("a\0b", r"a\\x00b: no such image file"),
        ("x" * 1_000_000, "File name too long"),
        ("https://example.org/a.png", "--allow-remote"),
        ("HTTP://example.org/a.png", "allow_remote=True"),
        ("rtsp://example.org/live", "rtsp:// is not read"),
        ("concat://a|b", "concat:// is not read"),
        ("file://server/share/a.png", "names no file of this machine"),
        ("file:///nothing.png", "no such image file"),
        ("data:image/png;base64,?", "not base64"),
        ("data:image/png;base64,\ud83d", "not base64"),
        ("data:image/png;base64,", "holds no content"),
        ("/dev/zero", "is a device"),
        (io.StringIO("text"), "open it with mode 'rb'"),
        (7, "cannot be of type int"),
        ({"bytes": b""}, "cannot be of type dict"),
    ],
)
def test_what_cannot_be_read_is_one_short_line(folder, source, message):
    with pytest.raises(InputError, match=message) as error:
        path_or_bytes(source, "image", "image file", "a path or bytes")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def as_another_user(function) -> str:
    """Runs a function in a child process without the rights of root, and returns the message of its InputError."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            function()
        except InputError as error:
            os.write(send, str(error).encode())
        finally:
            os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with open(receive, "rb") as pipe:
        return pipe.read().decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who becomes another user")
@pytest.mark.parametrize("locked", ["secret.png", "secret", "secret/a.png"])
def test_permissions_are_named(tmp_path, monkeypatch, locked):
    os.chmod(tmp_path, 0o755)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir(mode=0o700)
    for name in ("secret.png", "secret/a.png"):
        (tmp_path / name).write_bytes(CONTENT)
        os.chmod(tmp_path / name, 0o600)
    message = as_another_user(lambda: path_or_bytes(locked, "image", "image file", "a path"))
    assert message.startswith(f"{locked}: no permission to read it")
