"""JSON files of a checkpoint, read within bounds, and their values by type and range.

Whatever such a file holds, the result is a value of the type that was asked for, or an InputError of one line.
"""

import collections
import json
import os
import pathlib
import reprlib
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath

from vl3_jax.errors import InputError, printable

_MAX_BYTES = 2**25  # three times the largest tokenizer.json of Qwen2.5
_MAX_DEPTH = 64
_MAX_INTEGER = 2**31 - 1
_MAX_NUMBER = 1e30  # float32 holds it and its inverse
_SHOWN = 80  # characters of a value in a message
_CORRECT = "correct the file or download it again"


class JsonObject(dict[str, Any]):
    """An object of a JSON file, with methods that check the values which they return.

    A missing key and `null` give the default. Every method raises InputError, with the file, the key and the value, if
    the value is of another type or out of its range.

    Attributes:
      path: Path of the file.
      place: Keys of the objects around this one, such as "text_config.".
    """

    def __init__(self, values: dict[str, Any], path: str | os.PathLike, place: str = ""):
        super().__init__(values)
        self.path, self.place = path, place

    def integer(self, key: str, default: Any = None, low: int = 0, high: int = _MAX_INTEGER) -> Any:
        """Returns an integer from `low` to `high`."""
        valid = self._is_integer(value := self.get(key), low, high)
        return self._checked(key, value, default, valid, f"an integer from {low} to {high}")

    def integers(self, key: str, low: int = 0, high: int = _MAX_INTEGER) -> list[int]:
        """Returns a list of integers; one that stands alone is a list of one, and a missing key an empty list."""
        value = self.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        valid = all(self._is_integer(item, low, high) for item in listed)
        return self._checked(key, listed, [], valid, f"integers from {low} to {high}")

    def number(self, key: str, default: Any = None, low: float = 1 / _MAX_NUMBER, high: float = _MAX_NUMBER) -> Any:
        """Returns a float from `low` to `high`: by default one above 0 that float32 holds."""
        valid = self._is_number(value := self.get(key), low, high)
        self._checked(key, value, None, valid, f"a number from {low:g} to {high:g}")
        return float(value) if valid else default

    def numbers(self, key: str, count: int, low: float = -_MAX_NUMBER) -> tuple[float, ...] | None:
        """Returns `count` floats of at least `low`; a number that stands alone is all of them. None if missing."""
        value = self.get(key)
        listed = value if isinstance(value, list) else [value] * count
        valid = len(listed) == count and all(self._is_number(item, low, _MAX_NUMBER) for item in listed)
        if self._checked(key, value, None, valid, f"{count} numbers from {low:g}") is None:
            return None
        return tuple(map(float, listed))

    def flag(self, key: str, default: Any = False) -> Any:
        """Returns true or false."""
        value = self.get(key)
        return self._checked(key, value, default, isinstance(value, bool), "true or false")

    def text(self, key: str, default: Any = None) -> Any:
        """Returns a string."""
        value = self.get(key)
        return self._checked(key, value, default, isinstance(value, str), "a text")

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns a list of strings; one that stands alone is a list of one, and a missing key an empty list."""
        value = self.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        valid = all(isinstance(item, str) for item in listed)
        return tuple(self._checked(key, listed, [], valid, "a list of texts"))

    def choice(self, key: str, allowed: Collection[str], default: Any = None) -> Any:
        """Returns one of the strings `allowed`."""
        valid = isinstance(value := self.get(key), str) and value in allowed
        return self._checked(key, value, default, valid, f"one of {', '.join(allowed)}")

    def choices(self, key: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Returns those of the strings `allowed` that are in a list; all of them if it is missing."""
        value = self.get(key)
        valid = isinstance(value, list) and all(isinstance(item, str) and item in allowed for item in value)
        return tuple(self._checked(key, value, allowed, valid, f"a list of {', '.join(allowed)}"))

    def section(self, key: str) -> "JsonObject":
        """Returns an object; an empty one if it is missing."""
        value = self.get(key)
        section = self._checked(key, value, {}, isinstance(value, dict), "an object")
        return JsonObject(section, self.path, f"{self.place}{key}.")

    def sections(self, key: str) -> list["JsonObject"]:
        """Returns a list of objects; an empty one if it is missing."""
        value = self.get(key)
        valid = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        listed = self._checked(key, value, [], valid, "a list of objects")
        return [JsonObject(item, self.path, f"{self.place}{key}[{number}].") for number, item in enumerate(listed)]

    def error(self, key: str, problem: str) -> InputError:
        """Returns an error about the value of a key."""
        return InputError(f"{self.path}: {printable(self.place + key)} is {shown(self.get(key))}; {problem}")

    def _checked(self, key: str, value: Any, default: Any, valid: bool, expected: str) -> Any:
        if value is None:
            return default
        if not valid:
            raise self.error(key, f"expected {expected}")
        return value

    @staticmethod
    def _is_integer(value: Any, low: int, high: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    @staticmethod
    def _is_number(value: Any, low: float, high: float) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def read_json(path: pathlib.Path | epath.Path, unique: bool = False) -> Any:
    """Reads a JSON file.

    Args:
      path: Path of the file.
      unique: Whether a key that an object has twice is refused; otherwise its last value counts.

    Raises:
      InputError: The file cannot be read, is not valid JSON (the message names the line), or is too large or too deep.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file; check the folder")
    if os.path.isfile(path):
        _check_length(os.path.getsize(path), path, _MAX_BYTES)
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); check the folder") from None
    return parse_json(content, path, unique=unique)


def parse_json(content: bytes, path: str | os.PathLike, limit: int = _MAX_BYTES, unique: bool = False) -> Any:
    """Parses the content of a JSON file.

    Args:
      content: The content.
      path: Path of the file, for error messages.
      limit: Largest length of the content in bytes.
      unique: Whether a key that an object has twice is refused; otherwise its last value counts.

    Raises:
      InputError: As `read_json`.
    """
    _check_length(len(content), path, limit)
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys if unique else None)
        level = [value] if isinstance(value, dict | list) else []
        for _ in range(_MAX_DEPTH):
            inner = (part.values() if isinstance(part, dict) else part for part in level)
            level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if level:
            raise RecursionError
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error}); {_CORRECT}") from None
    except RecursionError:
        raise InputError(f"{path}: nested more than {_MAX_DEPTH} levels deep; {_CORRECT}") from None
    except ValueError as error:  # not UTF-8, a number of thousands of digits, or a key twice
        raise InputError(f"{path}: not valid JSON ({error}); {_CORRECT}") from None
    return value


def _check_length(length: int, path: str | os.PathLike, limit: int) -> None:
    if length > limit:
        raise InputError(f"{path}: {length} bytes long; such a file has at most {limit}; {_CORRECT}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of these keys and values; raises ValueError if a key occurs twice: one value would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"{collections.Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice")
    return values


def read_object(path: pathlib.Path | epath.Path, missing_ok: bool = True) -> JsonObject:
    """Reads a JSON file that holds an object.

    Args:
      path: Path of the file.
      missing_ok: Whether a file that does not exist is an empty object.

    Raises:
      InputError: As `read_json`, or the file holds something else.
    """
    value = {} if missing_ok and not path.is_file() else read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {shown(value)}, and an object is expected; {_CORRECT}")
    return JsonObject(value, path)


def shown(value: Any) -> str:
    """Returns a value for a message: the begin of its `repr`."""
    text = reprlib.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
