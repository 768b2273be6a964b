"""Configuration files: Python files with `get_config()`, and changes of them from the command line."""

import ast
import importlib.util
import inspect
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vl3_jax.errors import InputError


def load(name: str | os.PathLike, changes: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a file, after changes such as `data.datasets.TextCaps.weight=2`.

    Args:
      name: `path/to/file.py`, or `path/to/file.py:variant`, where `get_config` takes a variant.
      changes: `key=value` each.

    Raises:
      InputError: no such file, variant or key, or a value of another type; one line.
    """
    path, _, variant = os.fspath(name).partition(".py:")
    path += ".py" if variant else ""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such configuration; see the folder configs/")
    spec = importlib.util.spec_from_file_location("vl3_config", path)
    if spec is None:
        raise InputError(f"{path}: not a Python file; see the folder configs/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    if not hasattr(module, "get_config"):
        raise InputError(f"{path}: has no get_config(); see the folder configs/ for examples")
    if variant and not inspect.signature(module.get_config).parameters:
        raise InputError(f"{path}: has no variants, so leave out {variant!r}")
    return changed(module.get_config(variant) if variant else module.get_config(), changes)


def changed(config: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    """The configuration itself, after changes `key=value`. InputError for a key that is not there."""
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise InputError(f"{change}: give a change as key=value")
        set_value(config, key, text)
    return config


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets `a.b.c`; text is read as a Python value of the type that was there."""
    *parents, last = key.split(".")
    place = config
    for name in parents:
        place = _inside(place, name, key)
    present = _inside(place, last, key)
    if isinstance(value, str) and isinstance(present, tuple) and value[:1] not in "([":
        value = (value,)  # one path needs no brackets
    if isinstance(value, str) and not isinstance(present, str):
        value = _parsed(key, value, present)
    if isinstance(present, ConfigDict):
        raise InputError(f"{key}: a group of settings; change one of {', '.join(sorted(present.keys()))}")
    try:
        place[last] = float(value) if isinstance(present, float) and isinstance(value, int) else value
    except TypeError:
        raise InputError(f"{key}={value}: give a value like {present!r}") from None


def _inside(place: Any, name: str, key: str) -> Any:
    if not isinstance(place, ConfigDict) or name not in place:
        known = ", ".join(sorted(place.keys())) if isinstance(place, ConfigDict) else "nothing"
        raise InputError(f"{key}: no such setting: {name!r} is unknown; there are {known}")
    return place[name]


def _parsed(key: str, text: str, present: Any) -> Any:
    if isinstance(present, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise InputError(f"{key}={text}: give a value like {present!r}") from None
