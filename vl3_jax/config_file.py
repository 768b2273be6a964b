"""Configurations by name or file, and their changes from the command line.

A configuration is a Python file with `get_config()`, which may take a variant, and returns settings (a dataclass, see
`config_tree`) or a ConfigDict. Those of this package are found by name from any folder: `stage4`, `stage4:7b,mock`,
`data/stage4`; a file of one's own is given by its path: `mine.py`, `mine.py:variant`.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from vl3_jax import config_tree
from vl3_jax.errors import InputError, printable, repr_of

# Installed, the configurations lie in the package; in a checkout, beside it.
_HERE = pathlib.Path(__file__).parent
FOLDER = next((folder for folder in (_HERE / "configs", _HERE.parent / "configs") if folder.is_dir()), _HERE)


def load(name: str | os.PathLike, changes: Sequence[str] = ()) -> ConfigDict:
    """Loads a configuration and changes it, as in `data.datasets.TextCaps.weight=2`.

    Args:
      name: Name of a configuration of this package or path of a Python file, and after a colon its variant.
      changes: `key=value` each.

    Raises:
      InputError: No such file, variant or key, or a value of another type; one line.
    """
    config = evaluate(name)
    return changed(config if isinstance(config, ConfigDict) else config_tree.to_config_dict(config), changes)


def evaluate(name: str | os.PathLike) -> Any:
    """Returns what `get_config` of a configuration returns; `name` is as in `load`.

    Raises:
      InputError: No such file or variant, or a file that is no configuration; one line.
    """
    path, variant = _find(os.fspath(name))
    spec = importlib.util.spec_from_file_location("vl3_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: not a Python file; give a configuration such as {FOLDER / 'stage4.py'}")
    module = importlib.util.module_from_spec(spec)
    with _errors_named(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(); see {FOLDER} for examples")
    with _errors_named(path):
        if variant and not inspect.signature(module.get_config).parameters:
            raise InputError(f"{path}: has no variants, so leave out {variant!r}")
        config = module.get_config(variant) if variant else module.get_config()
    if not isinstance(config, ConfigDict) and (isinstance(config, type) or not dataclasses.is_dataclass(config)):
        raise InputError(f"{path}: get_config() returns a {type(config).__name__}; return settings or a ConfigDict")
    return config


def names() -> list[str]:
    """Returns the names of this package's configurations."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("[!_]*.py"))


def changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """Changes a configuration in place and returns it.

    Raises:
      InputError: A change that is not `key=value`, a key that is not there, or a value of another type.
    """
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise InputError(f"{change}: give a change as key=value")
        _set(config, key, text)
    return config


@contextlib.contextmanager
def _errors_named(path: str) -> Iterator[None]:
    """Turns whatever the Python of a configuration raises into an InputError with its line."""
    try:
        yield
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise InputError(f"{where}: {type(error).__name__}: {error}") from error


def _find(name: str) -> tuple[str, str]:
    """Returns the path and the variant that a name means."""
    path, _, variant = name.partition(".py:")
    path += ".py" if variant else ""
    if path.endswith(".py") or os.path.isfile(path):
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such configuration; give a file, or one of {', '.join(names())}")
        return path, variant
    known, _, variant = name.partition(":")
    if known not in names():
        raise InputError(f"{known}: no such configuration; there are {', '.join(names())}; or give a file of your own")
    return os.fspath(FOLDER / f"{known}.py"), variant


def _set(config: ConfigDict, key: str, text: str) -> None:
    """Sets `a.b.c` to a text, read as a Python value of the type that was there."""
    group: Any = None
    present: Any = config
    for name in key.split("."):
        group = present
        if not isinstance(group, ConfigDict) or name not in group:
            known = ", ".join(sorted(group.keys())) if isinstance(group, ConfigDict) else "nothing"
            raise InputError(f"{key}: no such setting: {name!r} is unknown; there are {known}")
        present = group[name]
    if isinstance(present, ConfigDict):
        raise InputError(f"{key}: a group of settings; change one of {', '.join(sorted(present.keys()))}")
    value: Any = text
    if isinstance(present, tuple) and text[:1] not in ("(", "["):
        value = (text,) if text else ()  # one path needs no brackets
    elif not isinstance(present, str):
        value = _parsed(key, text, present)
    try:
        if isinstance(value, bool) is not isinstance(present, bool):
            raise TypeError  # a ConfigDict takes True for 1.0
        group[name] = value  # an int is converted where there was a float, a list where there was a tuple
    except (TypeError, OverflowError):
        raise InputError(f"{key}={printable(repr_of(value))}: give a value like {present!r}") from None


def _parsed(key: str, text: str, present: Any) -> Any:
    if isinstance(present, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"{key}={printable(text)}: give a value like {present!r}") from None
