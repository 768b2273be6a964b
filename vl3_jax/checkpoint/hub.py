"""Fetching a model from the Hugging Face Hub: weights as safetensors, json and tokenizer files, nothing else.

Neither the repository's Python nor its pickles are downloaded. A broken download continues where it stopped:
finished files stay in the hub cache and unfinished ones are asked for from their last byte on.
"""

import concurrent.futures
import functools
import pathlib
import re

from vl3_jax.errors import InputError

# Small files that travel with the weights, in either direction.
CARRIED_FILES = (
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
_PARALLEL = 4  # files fetched at a time
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_id(source: str) -> bool:
    """Whether `source` reads as `owner/name` or `owner/name@revision`."""
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith((".", "/"))


def download(source: str, token: str | None = None) -> pathlib.Path:
    """Fetches `owner/name[@revision]` into the hub cache and returns its folder.

    The token defaults to the one of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another server.

    Raises:
      InputError: no such repository or revision, no permission, no connection, no safetensors in it.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = source.partition("@")
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, token=token)
        wanted = _wanted(repository, [sibling.rfilename for sibling in info.siblings or []])
        fetch = functools.partial(
            huggingface_hub.hf_hub_download, repository, revision=info.sha or revision or None, token=token
        )
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
            files = list(pool.map(fetch, wanted))
    except errors.GatedRepoError:
        raise InputError(f"{source}: gated; accept its terms on its Hub page, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{source}: the repository has no revision {revision!r}; check its name") from None
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{source}: {_status(error)}{_not_found(error)}") from None
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{source}: not in the local cache and the Hub cannot be reached; check the network") from None
    except errors.OfflineModeIsEnabled:
        raise InputError(f"{source}: HF_HUB_OFFLINE is set and the model is not in the cache; unset it") from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"{source}: {_status(error)}the Hub refused the request; {_advice(error)}") from None
    except errors.HFValidationError as error:
        raise InputError(f"{source}: not a folder here and not a Hub id ({_first_line(error)})") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise InputError(f"{source}: no space left in the hub cache; set HF_HOME to a larger disk") from None
        raise InputError(
            f"{source}: the download broke off ({_first_line(error)}); run the same command again, it continues"
        ) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise InputError(
            f"{source}: the Hub cannot be reached ({_first_line(error)}); run the same command again, it continues"
        ) from None
    return pathlib.Path(files[0]).parent


def _wanted(repository: str, names: list[str]) -> list[str]:
    """The files at the top of the repository that a conversion reads."""
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    if not any(name.endswith(".safetensors") for name in weights):
        raise InputError(
            f"{repository}: the repository has no safetensors, and pickles are not fetched from the Hub; "
            "download it yourself and convert the folder"
        )
    sharded = [name for name in weights if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if sharded and "model.safetensors.index.json" in weights:
        weights = [*sharded, "model.safetensors.index.json"]
    adapter = [name for name in top if name in _ADAPTER_FILES]
    return [*[name for name in top if name in CARRIED_FILES], *adapter, *weights]


def _code(error) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _status(error) -> str:
    code = _code(error)
    return f"HTTP {code}: " if code else ""


def _not_found(error) -> str:
    if _code(error) == 401:
        return "private, or it does not exist; check the name, or `hf auth login` with an account that may read it"
    return "no such model on the Hub; check the name (owner/name or owner/name@revision)"


def _advice(error) -> str:
    code = _code(error)
    if code in (401, 403):
        return "check the token (`hf auth login`)"
    if code == 404:
        return "check the name and revision"
    return "run the same command again, it continues"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
