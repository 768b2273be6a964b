"""Downloads from a loopback server in place of the Hub: selected files, resumed transfers and error messages."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest

from support.hf_folders import assert_same_tensors, read_tensors, tiny, write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Server with one model, `vl3/tiny`.

    Attributes:
      folder: Folder with the files of the model.
      requests: Method, path and Range header of each request.
      cut: Number of bytes after which responses without a range break off for weights, or None.
      token: Token that requests must have, or None.
      refuse_ranges: Whether requests with a Range header are answered with status 503.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.cut, self.token, self.refuse_ranges = folder, [], None, None, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments):
        pass

    def answer(self, code: int, body: bytes = b"", **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub: Hub = self.server
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if self.path.split("/")[1:3] == ["vl3", "private"] or "vl3/private" in self.path:
            return self.answer(401, b"{}", X_Error_Message="Invalid username or password.")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, b"{}", X_Error_Message="Invalid username or password.")
        if match := re.fullmatch(r"/api/models/vl3/tiny(/revision/(\w+))?(\?.*)?", self.path):
            if match[2] not in (None, "main", "v2", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            siblings = [{"rfilename": name} for name in sorted(os.listdir(hub.folder))]
            body = {"id": "vl3/tiny", "modelId": "vl3/tiny", "sha": COMMIT, "siblings": siblings, "private": False}
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        if match := re.fullmatch(r"/vl3/tiny/resolve/\w+/(.+)", self.path):
            return self.serve_file(hub, match[1])
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    def serve_file(self, hub: Hub, name: str):
        content = (hub.folder / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.headers.get("Range") and hub.refuse_ranges:
            return self.answer(503)
        if self.headers.get("Range"):
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.answer(206, content[start:], Content_Range=content_range, **headers)
        if self.command == "GET" and hub.cut and name.endswith(".safetensors"):
            # Announces the full length, sends a part and closes the connection.
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content[: hub.cut])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.answer(200, content, **headers)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "repository"
    write_folder(folder, "official", tiny(), shards=2)
    (folder / "modeling_videollama3.py").write_text("raise SystemExit('never run')")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 100)
    (folder / "README.md").write_text("a model")
    (folder / "training_args.json").write_text("{}")
    server = Hub(folder)
    yield server
    server.shutdown()


def convert(hub: Hub, tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        environment.pop(name, None)
    environment["NO_PROXY"] = "127.0.0.1"
    command = [sys.executable, "-m", "vl3_jax.cli.main", "convert", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_only_the_needed_files_are_downloaded(hub, tmp_path):
    process = convert(hub, tmp_path, "hf", "vl3/tiny@v2", str(tmp_path / "o"))
    assert process.returncode == 0, process.stderr
    fetched = {path.rsplit("/", 1)[1] for command, path, _ in hub.requests if "/resolve/" in path and command == "GET"}
    expected = {name for name in os.listdir(hub.folder) if name.endswith((".safetensors", ".json"))}
    assert fetched == expected - {"training_args.json"}
    assert any("/revision/v2" in path for _, path, _ in hub.requests)
    process = convert(hub, tmp_path, "export", str(tmp_path / "o"), str(tmp_path / "a"), "--format", "official")
    assert process.returncode == 0, process.stderr
    assert_same_tensors(read_tensors(tmp_path / "a"), read_tensors(hub.folder))


def test_interrupted_download_is_resumed(hub, tmp_path):
    hub.cut = 200_000
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o"))
    resumed = [int(re.match(r"bytes=(\d+)-", header)[1]) for _, _, header in hub.requests if header]
    assert hub.cut in resumed, (hub.requests, process.stderr)
    assert process.returncode == 0, process.stderr
    assert convert(hub, tmp_path, "verify", str(tmp_path / "o"), str(hub.folder), "--no-logits").returncode == 0


def test_same_command_resumes_a_download(hub, tmp_path):
    hub.cut, hub.refuse_ranges = 150_000, True
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o"))
    assert process.returncode == 2
    lines = [line for line in process.stderr.splitlines() if line.startswith("vl3 ")]
    assert len(lines) == 1
    assert "run the same command again" in lines[0]
    assert not (tmp_path / "o").exists()
    hub.refuse_ranges = False
    hub.requests.clear()
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o"))
    assert process.returncode == 0, process.stderr
    ranges = [header for command, path, header in hub.requests if command == "GET" and path.endswith(".safetensors")]
    assert ranges
    assert set(ranges) == {"bytes=150000-"}  # received bytes are not requested again
    assert convert(hub, tmp_path, "verify", str(tmp_path / "o"), str(hub.folder), "--no-logits").returncode == 0
    hub.shutdown()
    hub.server_close()  # downloaded files need no server
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "again"))
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vl3/nothing", ["404", "no such model on the Hub"]),
        ("vl3/private", ["401", "hf auth login"]),
        ("vl3/tiny@v9", ["no revision 'v9'"]),
    ],
)
def test_errors_are_one_line(hub, tmp_path, name, words):
    process = convert(hub, tmp_path, "hf", name, str(tmp_path / "o"))
    assert process.returncode == 2
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith(f"vl3 convert: {name}")
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "o").exists()


def test_token_and_unreachable_server(hub, tmp_path):
    hub.token = "hf_secret"
    assert convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o")).returncode == 2
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o"), "--token", "hf_secret")
    assert process.returncode == 0, process.stderr
    hub.shutdown()
    hub.server_close()
    process = convert(hub, tmp_path, "hf", "vl3/other", str(tmp_path / "o2"))
    assert process.returncode == 2
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr


def test_repository_with_pickles_only(hub, tmp_path):
    for file in hub.folder.glob("*.safetensors"):
        file.unlink()
    process = convert(hub, tmp_path, "hf", "vl3/tiny", str(tmp_path / "o"))
    assert process.returncode == 2
    assert "no safetensors" in process.stderr
