"""Files of this user's cache that are unpickled: read only if they are the user's own and undamaged."""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

from vl3_jax import compilation_cache
from vl3_jax.versions import version

_FOLDERS = ("inference", "kernels", "model", "parallel")  # of the code that programs are made from
_DIGEST = hashlib.sha256
_SIZE = _DIGEST().digest_size


def read(path: pathlib.Path) -> Any | None:
    """Returns what `write` wrote; None if it is not there, damaged, or of another user."""
    try:
        if path.stat().st_uid != os.getuid():
            return None
        content = path.read_bytes()
        return pickle.loads(content[_SIZE:]) if _DIGEST(content[_SIZE:]).digest() == content[:_SIZE] else None
    except Exception:  # of any type: the file is not ours, or the libraries have changed
        return None


def write(path: pathlib.Path, value: Any) -> None:
    """Writes a value at once or not at all; nothing depends on it."""
    with contextlib.suppress(Exception):
        content = pickle.dumps(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix, delete=False) as file:
            file.write(_DIGEST(content).digest() + content)
        os.replace(file.name, path)


def name_of(*signature: str) -> str:
    """Returns a file name for a value that depends on these texts, on this package's code, and on its libraries."""
    libraries = (str(version(name)) for name in ("jax", "jaxlib", "flax"))
    return _DIGEST("\n".join([*signature, *libraries, _code_digest()]).encode()).hexdigest()


def kept(function: Callable) -> Callable:
    """Keeps the results of a pure function in memory and on disk, by the text of its arguments."""

    @functools.lru_cache
    @functools.wraps(function)
    def stored(*arguments: Any) -> Any:
        name = name_of(function.__qualname__, *map(repr, arguments))
        path = compilation_cache.default_folder() / "shapes" / f"{name}.pickle"
        result = read(path)
        if result is None:
            result = function(*arguments)
            write(path, result)
        return result

    return stored


@functools.cache
def _code_digest() -> str:
    digest, folder = _DIGEST(), pathlib.Path(__file__).parent
    for name in _FOLDERS:
        for path in sorted((folder / name).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
