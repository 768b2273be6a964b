"""In-process Cloud Storage server: in-memory buckets behind the parts of the JSON API that the clients call.

Requests of each client (gcsfs 2026.10, google-cloud-storage 3.17, tensorstore 0.1.86, Orbax 0.12.8):

    gcsfs (epath, fsspec)     objects: metadata, list, ranged media download, resumable upload, move, delete
    google-cloud-storage      bucket: metadata (Orbax asks for its kind of namespace); objects: list, metadata,
                              media download, multipart upload and delete, the last two with preconditions
    tensorstore               objects: ranged media download, list, media upload with preconditions
"""

import base64
import contextlib
import dataclasses
import email
import hashlib
import http.server
import itertools
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator

_REFUSALS = {
    401: "Anonymous caller does not have storage.objects.get access. Permission denied on resource.",
    403: "nobody@example.com does not have storage.objects access. Permission denied on resource.",
}


@dataclasses.dataclass(frozen=True)
class StoredObject:
    """An object.

    Attributes:
      data: Content of the object.
      generation: Number that increases with every write to the server.
    """

    data: bytes
    generation: int

    def metadata(self, bucket: str, name: str, url: str) -> dict:
        """Returns the object resource of the JSON API."""
        minutes, seconds = divmod(self.generation, 60)
        timestamp = f"2026-01-01T{minutes // 60 % 24:02d}:{minutes % 60:02d}:{seconds:02d}.000Z"
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "bucket": bucket,
            "name": name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "timeCreated": timestamp,
            "updated": timestamp,
            "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
            "selfLink": url + path,
            "mediaLink": f"{url}/download{path}?alt=media",
        }


class FakeGcs(http.server.ThreadingHTTPServer):
    """Cloud Storage server that runs at `url` as long as it is entered as a context manager.

    Attributes:
      url: Address of the server.
      buckets: Objects by bucket and name.
      refused: Status 401 or 403 with which all requests to a bucket are answered, by bucket.
      read_only: Buckets that answer 403 to requests that modify them.
      stalled: Suffix of the object names whose upload is never answered.
      stalling: Set when such an upload has arrived.
      log: "METHOD path" of each request.
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.buckets: dict[str, dict[str, StoredObject]] = {name: {} for name in buckets}
        self.refused: dict[str, int] = {}
        self.read_only: set[str] = set()
        self.stalled: str | None = None
        self.stalling = threading.Event()
        self.log: list[str] = []
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.lock = threading.RLock()
        self._generations = itertools.count(1)

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Directs the clients of this process and of its child processes to the server, without credentials."""
        variables = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks Google for the kind of bucket, over gRPC
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "nobody",
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        """Stores an object and returns its metadata."""
        with self.lock:
            stored = self.buckets[bucket][name] = StoredObject(data, next(self._generations))
        return stored.metadata(bucket, name, self.url)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Returns the sorted names of the objects."""
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def handle_error(self, *_args) -> None:
        """Ignores clients that close the connection."""

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self.shutdown()
        self.server_close()


class _ErrorResponse(Exception):
    """Raised to answer a request with an error status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**20  # sends a response as one packet; a second one would wait for the acknowledgement of the first
    server: FakeGcs

    def log_message(self, *_args) -> None:
        """Suppresses the log line of each request."""

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{self.command} {urllib.parse.unquote(self.path)}")
        try:
            self._route(path)
        except _ErrorResponse as error:
            self._answer(error.status, {"error": {"code": error.status, "message": error.message}})

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _route(self, path: str) -> None:
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", path)
        if match is None:
            raise _ErrorResponse(400, f"the fake does not support {self.command} {path}")
        kind, bucket, objects, name = match.groups()
        self._check(bucket)
        if not objects:
            return self._answer(200, {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        if kind == "/upload":
            return self._upload(bucket)
        if name and (moved := re.fullmatch(r"(.*)/moveTo/o/(.*)", name)):
            return self._move(bucket, *map(urllib.parse.unquote, moved.groups()))
        return self._list(bucket) if name is None else self._object(bucket, urllib.parse.unquote(name))

    def _check(self, bucket: str) -> None:
        status = self.server.refused.get(bucket)
        if bucket in self.server.read_only and self.command != "GET":
            status = 403
        if status:
            raise _ErrorResponse(status, _REFUSALS[status])
        if bucket not in self.server.buckets:
            raise _ErrorResponse(404, "The specified bucket does not exist.")

    def _object(self, bucket: str, name: str) -> None:
        stored = self.server.buckets[bucket].get(name)
        if stored is None or self.query.get("generation", str(stored.generation)) != str(stored.generation):
            raise _ErrorResponse(404, f"No such object: {bucket}/{name}")
        if self.command == "DELETE":
            with self.server.lock:
                self._check_generation(bucket, name)
                del self.server.buckets[bucket][name]
            return self._answer(204)
        if self.query.get("alt") != "media":
            return self._answer(200, stored.metadata(bucket, name, self.server.url))
        generation, size = {"X_Goog_Generation": str(stored.generation)}, len(stored.data)
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if byte_range is None:
            return self._answer(200, stored.data, **generation)
        start, stop = int(byte_range[1]), min(size, int(byte_range[2] or size) + 1)
        if start >= size:
            raise _ErrorResponse(416, "The requested range cannot be satisfied.")
        self._answer(206, stored.data[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{size}", **generation)

    def _move(self, bucket: str, name: str, target: str) -> None:
        with self.server.lock:
            stored = self.server.buckets[bucket].pop(name, None)
        if stored is None:
            raise _ErrorResponse(404, f"No such object: {bucket}/{name}")
        self._answer(200, self.server.put(bucket, target, stored.data))

    def _list(self, bucket: str) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        with self.server.lock:
            objects = sorted(self.server.buckets[bucket].items())
        items, prefixes = [], []
        for name, stored in objects:
            if not name.startswith(prefix) or name < start or (end is not None and name >= end):
                continue
            position = name.find(delimiter, len(prefix)) if delimiter else -1
            if position < 0:
                items.append(stored.metadata(bucket, name, self.server.url))
            elif name[: position + 1] not in prefixes[-1:]:
                prefixes.append(name[: position + 1])
        self._answer(200, {"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def _upload(self, bucket: str) -> None:
        kind, uploads = self.query.get("uploadType"), self.server.uploads
        if "upload_id" in self.query:
            return self._continue(*uploads[self.query["upload_id"]])
        if kind == "resumable":
            key = f"upload{len(uploads)}"
            uploads[key] = (bucket, self.query["name"], bytearray())
            location = f"{self.server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={key}"
            return self._answer(200, {}, Location=location)
        if kind == "multipart":
            parts = email.message_from_bytes(
                b"Content-Type: %s\r\n\r\n" % self.headers["Content-Type"].encode() + self.body
            )
            metadata, content = (part.get_payload(decode=True) for part in parts.get_payload())
            return self._store(bucket, json.loads(metadata)["name"], content)
        if kind != "media":
            raise _ErrorResponse(400, f"the fake does not support uploads of type {kind}")
        self._store(bucket, self.query["name"], self.body)

    def _check_generation(self, bucket: str, name: str) -> None:
        """Applies the precondition of a request: a number that the object's generation must be, 0 for no object."""
        stored = self.server.buckets[bucket].get(name)
        generation = self.query.get("ifGenerationMatch")
        if generation is not None and int(generation) != (stored.generation if stored else 0):
            raise _ErrorResponse(412, "At least one of the pre-conditions you specified did not hold.")

    def _continue(self, bucket: str, name: str, data: bytearray) -> None:
        """Receives one chunk of a resumable upload; `Content-Range: bytes 0-99/*` means that more chunks follow."""
        data += self.body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        self._store(bucket, name, bytes(data))

    def _store(self, bucket: str, name: str, data: bytes) -> None:
        if self.server.stalled and name.endswith(self.server.stalled):
            self.server.stalling.set()
            threading.Event().wait()
        with self.server.lock:
            self._check_generation(bucket, name)
            metadata = self.server.put(bucket, name, data)
        self._answer(200, metadata)
