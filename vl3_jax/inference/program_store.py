"""Compiled programs on disk, with their signatures: a later start neither traces, nor lowers, nor compiles.

A file is named by a hash of everything that a program depends on: the versions of jax and of the compiler, the devices
and their flags, this package's code, the model, and the shapes. What cannot be read (damaged, of another user, of
another version of the library behind the same name) is compiled anew and replaced.
"""

import contextlib
import io
import os
import pathlib
import pickle
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import serialize_executable

from vl3_jax import private_files

_SUFFIX = ".vl3program"
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
        """Returns the program with this signature for some devices, or None if none can be used."""
        content = private_files.read(self._path(signature))
        try:
            return content and _Unpickler(content, devices).load()
        except Exception:  # of any type: the libraries have changed
            return None

    def save(self, program: Any, *signature: str) -> None:
        """Writes what consists of compiled programs, if their devices allow that and the folder can be written."""
        with contextlib.suppress(Exception):  # answers do not depend on it
            content = io.BytesIO()
            _Pickler(content).dump(program)
            private_files.write(self._path(signature), content.getvalue())

    def _path(self, signature: tuple[str, ...]) -> pathlib.Path:
        return self._folder / f"{private_files.name_of(*signature, _environment())}{_SUFFIX}"


class _Pickler(pickle.Pickler):
    """Writes compiled programs as their devices give them away."""

    def persistent_id(self, obj: Any) -> Any:
        return serialize_executable.serialize(obj) if isinstance(obj, jax.stages.Compiled) else None


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote, for some devices."""

    def __init__(self, content: bytes, devices: Sequence[Any]):
        super().__init__(io.BytesIO(content))
        self._devices = devices

    def persistent_load(self, pid: Any) -> Any:
        return serialize_executable.deserialize_and_load(*pid, execution_devices=self._devices)


def tree_signature(tree: Any) -> str:
    """Returns structure, shapes, types and shardings of a tree of arrays as text."""
    leaves, structure = jax.tree.flatten(tree)
    described = [f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'sharding', None)}" for leaf in leaves]
    return "\n".join([str(structure), *described])


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
            devices[0].platform,
            devices[0].device_kind,
            devices[0].client.platform_version,
            str(len(devices)),
            *flags,
            *(str(jax.config.values[name]) for name in settings),
            cpu,
        ]
    )
