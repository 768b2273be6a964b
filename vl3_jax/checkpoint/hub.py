"""Downloads a model from the Hugging Face Hub: safetensors, JSON and tokenizer files only.

Neither the repository's Python nor its pickles are downloaded. Files that are in the hub cache are used from there;
others go to `$HF_HOME/vl3`, where an interrupted download continues from its last byte (huggingface_hub itself drops
unfinished files when its process ends).
"""

import concurrent.futures
import errno
import logging
import pathlib
import re
import shutil
import urllib.parse

from vl3_jax.checkpoint.download import BrokenDownload, download_file
from vl3_jax.checkpoint.progress import progress_bar
from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

# Small files that are copied along with the weights in either direction.
SIDECAR_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_ADAPTER_FILES = ("adapter_config.json",)
_NUM_WORKERS = 4  # concurrent downloads
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """Returns whether `source` has the form `owner/name` or `owner/name@revision`."""
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith((".", "/"))


def download(source: str, token: str | None = None) -> pathlib.Path:
    """Downloads a model from the Hub.

    Args:
      source: Hub id `owner/name[@revision]`. The environment variable HF_ENDPOINT names another server.
      token: Hub token; by default that of `hf auth login` or HF_TOKEN.

    Returns:
      Local folder with the files.

    Raises:
      InputError: The repository or revision does not exist, is not accessible or has no safetensors, the disk is
        full, or the connection failed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = source.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, token=token)
        names = _select_files(repository, [sibling.rfilename for sibling in info.siblings or []])
        folder = _fetch(repository, info.sha or revision or "main", token, names)
        reference = _cache_folder(repository) / "refs" / (revision or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(folder.name)
    except errors.GatedRepoError:
        raise InputError(f"{source}: gated; accept its terms on its Hub page, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{source}: the repository has no revision {revision!r}; check its name") from None
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{source}: {_status(error)}{_not_found(error)}") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{source}: not in the local cache and the Hub cannot be reached; check the network") from None
    except errors.OfflineModeIsEnabled:
        if folder := _offline_copy(repository, revision):
            return folder
        raise InputError(f"{source}: HF_HUB_OFFLINE is set and the model is not in the cache; unset it") from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"{source}: {_status(error)}the Hub refused the request; {_advice(error)}") from None
    except errors.HFValidationError as error:
        raise InputError(
            f"{source}: not a local folder and not a Hub id ({_first_line(error)}); check the name"
        ) from None
    except (OSError, RuntimeError, BrokenDownload) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(f"{source}: no space left in the hub cache; set HF_HOME to a larger disk") from None
        raise InputError(
            f"{source}: the download was interrupted ({_first_line(error)}); run the same command again to resume it"
        ) from None
    except Exception as error:
        if not _is_transport(error):
            raise
        if folder := _offline_copy(repository, revision):
            logger.warning("warning: the Hub cannot be reached; using %s", folder)
            return folder
        raise InputError(
            f"{source}: the Hub cannot be reached ({_first_line(error)}); run the same command again to resume"
        ) from None
    return folder


def _fetch(repository: str, revision: str, token: str | None, names: list[str]) -> pathlib.Path:
    """Collects the files `names` in one folder: linked from the hub cache if they are there, downloaded otherwise."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers

    folder = _cache_folder(repository) / revision
    folder.mkdir(parents=True, exist_ok=True)
    headers = build_hf_headers(token=token)
    missing = []
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str) and not (folder / name).exists():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(cached)
        if not (folder / name).exists():
            url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
            metadata = huggingface_hub.get_hf_file_metadata(url, token=token)
            if metadata.size is None:
                raise RuntimeError(f"the server does not report the size of {name}")
            missing.append((name, url, metadata))
    total = sum(metadata.size for _, _, metadata in missing)
    if total > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, "no space left")

    def get(name: str, url: str, metadata) -> None:
        location = metadata.location or url
        # A storage server has its own signature in the address and must not receive the token.
        same_server = urllib.parse.urlsplit(location).netloc == urllib.parse.urlsplit(url).netloc
        sent = headers if same_server else {key: headers[key] for key in headers if key.lower() != "authorization"}
        download_file(location, folder / name, metadata.size, metadata.etag, sent, bar)

    with (
        progress_bar(total, "download", quiet=not missing) as bar,
        concurrent.futures.ThreadPoolExecutor(_NUM_WORKERS) as pool,
    ):
        for future in [pool.submit(get, *file) for file in missing]:
            future.result()
    return folder


def _offline_copy(repository: str, revision: str) -> pathlib.Path | None:
    """Returns the folder of a complete earlier download, or None, for use without a connection to the Hub."""
    from huggingface_hub import constants

    cached = _cache_folder(repository)
    reference = cached / "refs" / (revision or "main")
    folder = cached / (reference.read_text() if reference.is_file() else revision or "main")
    if folder.is_dir() and not any(folder.glob("*.partial")) and any(folder.glob("*.safetensors")):
        return folder
    cached = pathlib.Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    reference = cached / "refs" / (revision or "main")
    snapshot = cached / "snapshots" / (reference.read_text() if reference.is_file() else revision or "main")
    return snapshot if snapshot.is_dir() else None


def _cache_folder(repository: str) -> pathlib.Path:
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HOME) / "vl3" / repository.replace("/", "--")


def _is_transport(error: Exception) -> bool:
    """Returns whether the error is one of the HTTP library that huggingface_hub uses."""
    return type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _select_files(repository: str, names: list[str]) -> list[str]:
    """Selects the top-level files of the repository that a conversion reads."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    if not any(name.endswith(".safetensors") for name in weights):
        raise InputError(
            f"{repository}: the repository has no safetensors, and pickles are not downloaded from the Hub; "
            "download it yourself and convert the folder"
        )
    sharded = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if sharded and "model.safetensors.index.json" in weights:
        weights = [*sharded, "model.safetensors.index.json"]
    adapter = [name for name in top if name in _ADAPTER_FILES]
    return [*[name for name in top if name in SIDECAR_FILES], *adapter, *weights]


def _code(error) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(error) -> str:
    code = _code(error)
    return f"HTTP {code}: " if code else ""


def _not_found(error) -> str:
    if _code(error) == 401:
        return "private or nonexistent; check the name, or `hf auth login` with an account that may read it"
    return "no such model on the Hub; check the name (owner/name or owner/name@revision)"


def _advice(error) -> str:
    code = _code(error)
    if code in (401, 403):
        return "check the token (`hf auth login`)"
    if code == 404:
        return "check the name and revision"
    return "run the same command again to resume"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
