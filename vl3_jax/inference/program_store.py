"""Compiled programs on disk, with their signatures: a later start neither traces, nor lowers, nor compiles.

A file is named by a hash of everything that a program depends on: the versions of jax and of the compiler, the devices
and their flags, this package's code, the model, and the shapes. What cannot be read (damaged, of another user, of
another version of the library behind the same name) is compiled anew and replaced.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import pickle
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

import vl3_jax
from vl3_jax.versions import version

_FOLDERS = ("inference", "kernels", "model", "parallel")  # of the code that programs are made from
_SUFFIX = ".vl3program"
_DIGEST = hashlib.sha256
_CPU_INFO = pathlib.Path("/proc/cpuinfo")


class ProgramStore:
    """A folder of compiled programs.

    Args:
      folder: The folder, which is made when the first program is written.
    """

    _lock, _compiling = threading.Lock(), 0

    def __init__(self, folder: str | os.PathLike):
        self._folder = pathlib.Path(folder)

    @classmethod
    @contextlib.contextmanager
    def compiling(cls) -> Iterator[None]:
        """Turns jax's own cache off: a program that comes from there cannot be stored again. Threads may overlap."""
        option = "jax_enable_compilation_cache"
        with cls._lock:
            cls._compiling += 1
            if cls._compiling == 1:
                cls._enabled = jax.config.values[option]
                jax.config.update(option, False)
        try:
            yield
        finally:
            with cls._lock:
                cls._compiling -= 1
                if not cls._compiling:
                    jax.config.update(option, cls._enabled)

    def load(self, devices: Sequence[Any], *signature: str) -> Any | None:
        """Returns the compiled program with this signature for some devices, or None if none can be used."""
        path = self._path(signature)
        try:
            if path.stat().st_uid != os.getuid():
                return None
            content = path.read_bytes()
            size = _DIGEST().digest_size
            if _DIGEST(content[size:]).digest() != content[:size]:
                return None
            program = pickle.loads(content[size:])
            return serialize_executable.deserialize_and_load(*program, execution_devices=devices)
        except Exception:  # of any type: the file is not ours, or the libraries have changed
            return None

    def save(self, compiled: Any, *signature: str) -> None:
        """Writes a compiled program, if its devices allow that and the folder can be written."""
        with contextlib.suppress(Exception):  # answers do not depend on it
            content = pickle.dumps(serialize_executable.serialize(compiled))
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=_SUFFIX, delete=False) as file:
                file.write(_DIGEST(content).digest() + content)
            os.replace(file.name, self._path(signature))

    def _path(self, signature: tuple[str, ...]) -> pathlib.Path:
        text = "\n".join([*signature, _environment()])
        return self._folder / f"{_DIGEST(text.encode()).hexdigest()}{_SUFFIX}"


def tree_signature(tree: Any) -> str:
    """Returns structure, shapes, types and shardings of a tree of arrays as text."""
    leaves, structure = jax.tree.flatten(tree)
    described = [f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'sharding', None)}" for leaf in leaves]
    return "\n".join([str(structure), *described])


@functools.cache
def _code_digest() -> str:
    digest, folder = _DIGEST(), pathlib.Path(vl3_jax.__file__).parent
    for name in _FOLDERS:
        for path in sorted((folder / name).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _environment() -> str:
    """Returns what every program depends on."""
    devices = jax.devices()
    flags = (os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    settings = ("jax_enable_x64", "jax_default_matmul_precision", "jax_disable_most_optimizations")
    cpu = ""
    with contextlib.suppress(OSError):  # programs for a CPU use its instructions
        lines = _CPU_INFO.read_text().splitlines()
        cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return "\n".join(
        [
            *(str(version(name)) for name in ("jax", "jaxlib", "flax")),
            devices[0].platform,
            devices[0].device_kind,
            devices[0].client.platform_version,
            str(len(devices)),
            *flags,
            *(str(jax.config.values[name]) for name in settings),
            cpu,
            _code_digest(),
        ]
    )
