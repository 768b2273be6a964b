"""Downloads a model from the Hugging Face Hub: safetensors, JSON and tokenizer files only.

Neither the repository's Python nor its pickles are downloaded. Files that are in the hub cache are used from there;
others go to `$HF_HOME/vl3`, where an interrupted download continues from its last byte (huggingface_hub itself drops
unfinished files when its process ends).
"""

import concurrent.futures
import errno
import hashlib
import http.client
import logging
import os
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request

from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG, SIDECAR_FILES
from vl3_jax.errors import InputError
from vl3_jax.storage.durable import atomic_write, rename
from vl3_jax.storage.progress import progress_bar

logger = logging.getLogger(__name__)

_NUM_WORKERS = 4  # concurrent downloads
_CHUNK_BYTES = 2**20
_MAX_FAILURES = 5  # consecutive attempts without a single byte of progress
_TIMEOUT = 30.0  # seconds without a response
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class _BrokenDownload(Exception):
    """A transfer stopped; the received bytes are kept for the next run."""


def is_hub_id(source: str) -> bool:
    """Returns whether `source` has the form `owner/name` or `owner/name@revision`."""
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith((".", "/"))


def download(source: str, token: str | None = None, weights: bool = True) -> pathlib.Path:
    """Downloads a model from the Hub.

    Args:
      source: Hub id `owner/name[@revision]`. The environment variable HF_ENDPOINT names another server.
      token: Hub token; by default that of `hf auth login` or HF_TOKEN.
      weights: Whether to download the weights too, and not only the JSON and tokenizer files.

    Returns:
      Local folder with the files.

    Raises:
      InputError: The repository or revision does not exist, is not accessible or has no safetensors, the disk is
        full, or the connection failed.
    """
    import huggingface_hub

    repository, _, revision = source.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, token=token)
        names = _select_files(repository, [sibling.rfilename for sibling in info.siblings or []], weights)
        folder = _fetch(repository, info.sha or revision or "main", token, names)
        reference = _cache_folder(repository) / "refs" / (revision or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(reference, folder.name.encode())
        return folder
    except InputError:
        raise
    except Exception as error:
        is_offline = isinstance(error, huggingface_hub.errors.OfflineModeIsEnabled)
        if (is_offline or _is_transport(error)) and (folder := _offline_copy(repository, revision, weights)):
            if not is_offline:
                logger.warning("warning: the Hub cannot be reached; using %s", folder)
            return folder
        if message := _explain(error, revision):
            raise InputError(f"{source}: {message}") from None
        raise


def _explain(error: Exception, revision: str) -> str | None:
    """Returns what an error means and what to do; None for errors of ours."""
    from huggingface_hub import errors

    code, lines = getattr(getattr(error, "response", None), "status_code", None), str(error).splitlines()
    status, again = f"HTTP {code}: " if code else "", "run the same command again to resume"
    line = lines[0] if lines else type(error).__name__
    if _is_transport(error):
        return f"the Hub cannot be reached ({line}); {again}"
    no_model = "no such model on the Hub; check the name (owner/name or owner/name@revision)"
    private = "private or nonexistent; check the name, or `hf auth login` with an account that may read it"
    check_token = "check the token (`hf auth login`)"
    advice = {401: check_token, 403: check_token, 404: "check the name and revision"}.get(code, again)
    interrupted = f"the download was interrupted ({line}); {again} it"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    messages = {  # classes before those that they derive from
        errors.GatedRepoError: "gated; accept its terms on its Hub page, then `hf auth login`",
        errors.RevisionNotFoundError: f"the repository has no revision {revision!r}; check its name",
        errors.RepositoryNotFoundError: f"{status}{private if code == 401 else no_model}",
        errors.LocalEntryNotFoundError: "not in the local cache and the Hub cannot be reached; check the network",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and the model is not in the cache; unset it",
        errors.HfHubHTTPError: f"{status}the Hub refused the request; {advice}",
        errors.HFValidationError: f"not a local folder and not a Hub id ({line}); check the name",
        OSError: "no space left in the hub cache; set HF_HOME to a larger disk" if full else interrupted,
        RuntimeError: interrupted,
        _BrokenDownload: interrupted,
    }
    return next((message for kind, message in messages.items() if isinstance(error, kind)), None)


def _fetch(repository: str, revision: str, token: str | None, names: list[str]) -> pathlib.Path:
    """Collects the files `names` in one folder: linked from the hub cache if they are there, downloaded otherwise."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    folder = _cache_folder(repository) / revision
    folder.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers(token=token)
    missing = []
    for name in names:
        if (folder / name).exists():
            continue
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            (folder / name).unlink(missing_ok=True)  # a link to what the cache has dropped
            (folder / name).symlink_to(cached)
            continue
        url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        metadata = huggingface_hub.get_hf_file_metadata(url, token=token)
        if metadata.size is None:
            raise RuntimeError(f"the server does not report the size of {name}")
        missing.append((name, url, metadata))
    total = sum(metadata.size for _, _, metadata in missing)
    if total > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, "no space left")

    def get(file: tuple) -> None:
        name, url, metadata = file
        location = metadata.location or url
        # A storage server has its own signature in the address and must not receive the token.
        same_server = urllib.parse.urlsplit(location).netloc == urllib.parse.urlsplit(url).netloc
        sent = headers if same_server else {key: headers[key] for key in headers if key.lower() != "authorization"}
        _download_file(location, folder / name, metadata.size, metadata.etag, sent, bar)

    with (
        progress_bar(total, "download", quiet=not missing) as bar,
        concurrent.futures.ThreadPoolExecutor(_NUM_WORKERS) as pool,
    ):
        list(pool.map(get, missing))
    return folder


def _download_file(url: str, target: pathlib.Path, size: int, etag: str | None, headers: dict[str, str], bar) -> None:
    """Downloads `url` to `target`, using `<target>.partial` while the transfer is incomplete.

    Args:
      url: Address of the file.
      target: Path of the file to write.
      size: Length of the file in bytes.
      etag: ETag of the file. Where it is a SHA-256 (files in large-file storage), a resumed transfer is checked
        against it.
      headers: HTTP headers of the request.
      bar: Progress bar, advanced by the number of bytes received.

    Raises:
      _BrokenDownload: The server refused the request, or the connection failed repeatedly without progress.
      OSError: The disk is full or not writable.
    """
    partial = target.with_name(target.name + ".partial")
    partial.touch()
    if partial.stat().st_size > size:
        os.truncate(partial, 0)
    before, failures = partial.stat().st_size, 0
    bar.update(before)
    resumed = before > 0
    while before < size:
        try:
            _transfer(url, partial, before, headers, bar)
        except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404):
                raise _BrokenDownload(f"HTTP {error.code} for {target.name}") from error
            after = partial.stat().st_size
            failures = 0 if after > before else failures + 1
            if failures == _MAX_FAILURES:
                reason = getattr(error, "reason", None) or error
                raise _BrokenDownload(f"{target.name} at {after} of {size} bytes: {reason}") from error
            time.sleep(0.1 * 2**failures)
            resumed |= after > 0
        before = partial.stat().st_size
    if resumed and re.fullmatch(r"[0-9a-f]{64}", etag or "") and _sha256(partial) != etag:
        partial.unlink()
        raise _BrokenDownload(f"{target.name} does not match its SHA-256 and was removed")
    rename(partial, target)


def _transfer(url: str, partial: pathlib.Path, start: int, headers: dict[str, str], bar) -> None:
    if start:
        headers = {**headers, "Range": f"bytes={start}-"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
        if start and response.status != 206:  # the server ignores ranges and sends the file from its first byte
            bar.update(-start)
            start = 0
        with open(partial, "ab" if start else "wb") as file:
            # `read1` returns what has been received, so that a broken connection loses none of it.
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            expected = int(response.headers.get("Content-Length") or 0)
            if file.tell() - start < expected:
                raise http.client.IncompleteRead(b"", expected - (file.tell() - start))


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _offline_copy(repository: str, revision: str, with_weights: bool) -> pathlib.Path | None:
    """Returns the folder of a complete earlier download, or None, for use without a connection to the Hub."""
    from huggingface_hub import constants

    def snapshot(cached: pathlib.Path, snapshots: pathlib.Path) -> pathlib.Path:
        reference = cached / "refs" / (revision or "main")
        return snapshots / (reference.read_text() if reference.is_file() else revision or "main")

    own = _cache_folder(repository)
    folder = snapshot(own, own)
    pattern = "*.safetensors" if with_weights else "*.json"
    if folder.is_dir() and not any(folder.glob("*.partial")) and any(folder.glob(pattern)):
        return folder
    cached = pathlib.Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    folder = snapshot(cached, cached / "snapshots")
    return folder if folder.is_dir() else None


def _cache_folder(repository: str) -> pathlib.Path:
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HOME) / "vl3" / repository.replace("/", "--")


def _is_transport(error: Exception) -> bool:
    """Returns whether the error is one of the HTTP library that huggingface_hub uses."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _select_files(repository: str, names: list[str], with_weights: bool) -> list[str]:
    """Selects the top-level files of the repository that a conversion reads."""
    top = [name for name in names if "/" not in name]
    sidecars = [name for name in top if name in SIDECAR_FILES or name == ADAPTER_CONFIG]
    if not with_weights:
        return sidecars
    weights = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    if not any(name.endswith(".safetensors") for name in weights):
        raise InputError(
            f"{repository}: the repository has no safetensors, and pickles are not downloaded from the Hub; "
            "download it yourself and convert the folder"
        )
    sharded = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if sharded and "model.safetensors.index.json" in weights:
        weights = [*sharded, "model.safetensors.index.json"]
    return [*sidecars, *weights]
