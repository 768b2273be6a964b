"""Settings declared once, as frozen dataclasses, and their form as nested plain values.

The dataclasses are the truth: names, types, defaults, checks and, in the `Attributes` section of their docstrings,
descriptions. Configuration files and the command line see the same settings as an `ml_collections.ConfigDict`, which
is built from the dataclasses and turned back into them before anything else runs.

A field whose value may be None names in its metadata the value that stands for None in a file or on the command line,
and one of a few values may name these:

    prune_threshold: float | None = dataclasses.field(default=0.1, metadata={NONE: 0.0})
    merge: int = dataclasses.field(default=1, metadata={CHOICES: (1, 2)})

A number names the values it may have, and `check` refuses others, what is no number (NaN), and other types:

    fps: float = dataclasses.field(default=1.0, metadata={LIMITS: Limits(above=0)})

The metadata of a collection are those of its items; texts that are regular expressions say so with `REGEX`.

A dataclass whose instances stand in a mapping under one of their own fields names that field as its class variable
`KEY`; the plain form does not repeat it.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import re
import typing
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar

from vl3_jax.errors import InputError, SettingError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Settings = TypeVar("Settings")
# Keys of a field's metadata.
NONE = "none"  # what stands for None in the plain form
CHOICES = "choices"  # the values that there are
LIMITS = "limits"  # the `Limits` of a number
REGEX = "regex"  # whether a text is a regular expression
INT32 = 2**31 - 1  # the largest integer that a device holds
UINT32 = 2**32 - 1
_ATTRIBUTE = re.compile(r"^  (?P<names>[\w, ]+): (?P<text>.*(?:\n    .*)*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that a setting may be.

    Attributes:
      least: Smallest value; None where `above` says more, or there is none.
      most: Largest value; None if there is none.
      above: A value that all others are larger than, or None.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        bounds = (("from", self.least), ("above", self.above), ("up to", self.most))
        return " ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


COUNT = Limits(1, INT32)
AMOUNT = Limits(0, INT32)  # a count that may be none
SEED = Limits(0, UINT32)
SHARE = Limits(0, 1)


class CheckedSettings:
    """A base of frozen dataclasses whose values are checked against their declarations when they are made."""

    def __post_init__(self):
        check(self)


def check(settings: Any) -> None:
    """Checks the values of a dataclass instance against its declarations.

    Raises:
      SettingError: A value of another type, none of the choices, beyond the limits, infinite, or a text that is not the
        regular expression it should be.
    """
    for field, kind, optional in _declarations(type(settings)):
        value = getattr(settings, field.name)
        if value is not None or not optional:
            check_value(field.name, value, kind, field.metadata)


def check_value(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    """Checks one value, or each item of a collection, against its type and the metadata of its field; see `check`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is UnionType or origin is typing.Union:
        if value is not None:
            check_value(name, value, _without_none(kind), metadata)
    elif origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise SettingError(name, value, "give settings by name")
        for key, item in value.items():
            check_value(f"{name}.{key}", item, arguments[1], metadata)
    elif origin is not None and issubclass(origin, Sequence):
        _check_items(name, value, arguments, metadata)
    elif kind in (int, float, bool, str):
        _check_plain(name, value, kind, metadata)
    elif dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        raise SettingError(name, value, f"give a {kind.__name__}")


def _check_items(name: str, value: Any, kinds: Sequence[Any], metadata: Mapping[str, Any]) -> None:
    """Checks the items of a sequence: any number of one type, or a tuple of certain types."""
    endless = len(kinds) == 1 or kinds[-1] is Ellipsis
    if not isinstance(value, tuple | list) or not (endless or len(value) == len(kinds)):
        raise SettingError(name, value, f"give a list of {'any length' if endless else len(kinds)}")
    for number, item in enumerate(value):
        check_value(f"{name}[{number}]", item, kinds[0 if endless else number], metadata)


def _check_plain(name: str, value: Any, kind: type, metadata: Mapping[str, Any]) -> None:
    """Checks a number, a text or a flag."""
    choices, limits = metadata.get(CHOICES), metadata.get(LIMITS, Limits())
    if choices is not None and (isinstance(value, bool) or value not in choices):
        raise SettingError(name, value, f"use one of {', '.join(str(choice) or repr(choice) for choice in choices)}")
    if kind is bool and not isinstance(value, bool):
        raise SettingError(name, value, "give True or False")
    if kind is str:
        if not isinstance(value, str) or "\0" in value:
            raise SettingError(name, value, "give a text")
        if metadata.get(REGEX) and (problem := regex_problem(value)):
            raise SettingError(name, value, f"that is not a regular expression: {problem}")
    if kind not in (int, float):
        return
    right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not right or not (isinstance(value, int) or math.isfinite(value)) or value not in limits:
        raise SettingError(name, value, f"give {expected(kind, limits)}")


def expected(kind: type, limits: Limits) -> str:
    """Returns a number in words, such as "a whole number from 1 up to 9"."""
    return f"{'a whole number' if kind is int else 'a number'} {limits}".rstrip()


def regex_problem(pattern: str) -> str:
    """Returns why Python does not compile a regular expression; empty if it does."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def to_tree(settings: Any) -> dict[str, Any]:
    """Returns a dataclass instance as nested dicts of plain values, which JSON and ConfigDict can hold."""
    return {
        field.name: _to_plain(getattr(settings, field.name), field.metadata.get(NONE))
        for field in dataclasses.fields(settings)
        if field.name != getattr(settings, "KEY", None)
    }


def to_config_dict(settings: Any) -> "ConfigDict":
    """Returns the ConfigDict of a dataclass instance, for a user to override."""
    from ml_collections import ConfigDict  # only here: inference does without it

    return ConfigDict(to_tree(settings))


def from_tree(cls: type[Settings], tree: "Mapping[str, Any] | ConfigDict", where: str = "") -> Settings:
    """Builds a dataclass instance from its plain form; keys that are absent keep their defaults.

    Args:
      cls: The dataclass.
      tree: Nested mappings, such as a ConfigDict or the JSON of `to_tree`.
      where: Dotted path of `tree` within the whole configuration, for messages.

    Raises:
      InputError: A key that is no setting, a setting without a value, or a value that the dataclass refuses.
    """
    if not isinstance(tree, Mapping):
        if not hasattr(tree, "to_dict"):
            raise SettingError(where.rstrip(".") or "a configuration", tree, f"give the settings of a {cls.__name__}")
        tree = tree.to_dict()
    kinds, fields = types(cls), {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(map(str, set(tree) - set(fields)))
    if unknown:
        known = ", ".join(sorted(fields))
        raise InputError(f"{where}{unknown[0]}: no such setting: {unknown[0]!r} is unknown; there are {known}")
    for name, field in fields.items():
        if name not in tree and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}{name}: no value; the setting has no default, so give one")
    values = {}
    for name, value in tree.items():
        none = fields[name].metadata.get(NONE, dataclasses.MISSING)
        is_none = value == none and not isinstance(value, bool)
        values[name] = None if is_none else _from_plain(kinds[name], value, f"{where}{name}.")
    try:
        return cls(**values)
    except SettingError as error:
        raise error.renamed(f"{where}{error.name}") from None


def replace(settings: Settings, changes: Mapping[str, Any], where: str = "") -> Settings:
    """Returns a copy of nested settings with other values, which are checked once all of them are there.

    Args:
      settings: A dataclass instance, or a mapping of some.
      changes: Values by dotted path, such as {"mesh.fsdp": 8}.
      where: Dotted path of `settings` within the whole configuration, for messages.

    Raises:
      InputError: A path that is no setting, or a value that the dataclass refuses.
    """
    present: Mapping[str, Any] = settings if isinstance(settings, Mapping) else vars(settings)
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in present:
            raise InputError(
                f"{where}{path}: no such setting: {name!r} is unknown; there are {', '.join(sorted(present))}"
            )
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            values[name] = value
    values |= {name: replace(present[name], inner, f"{where}{name}.") for name, inner in nested.items()}
    return {**settings, **values} if isinstance(settings, Mapping) else dataclasses.replace(settings, **values)


def types(cls: type) -> dict[str, Any]:
    """Returns the type of each setting of a dataclass, without None where a setting may be that."""
    hints = typing.get_type_hints(cls)
    return {field.name: _without_none(hints[field.name]) for field in dataclasses.fields(cls)}


def descriptions(cls: type) -> dict[str, str]:
    """Returns the description of each setting of a dataclass, as its docstring (or that of a base class) gives it."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        _, _, attributes = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        for match in _ATTRIBUTE.finditer(attributes):
            found |= {name.strip(): " ".join(match["text"].split()) for name in match["names"].split(",")}
    return found


@functools.cache
def _declarations(cls: type) -> list[tuple[dataclasses.Field, Any, bool]]:
    """Returns each field of a dataclass with its type, and whether it may be None."""
    hints, kinds = typing.get_type_hints(cls), types(cls)
    return [(f, kinds[f.name], type(None) in typing.get_args(hints[f.name])) for f in dataclasses.fields(cls)]


def _without_none(hint: Any) -> Any:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    return members[0] if isinstance(hint, UnionType) and len(members) == 1 else hint


def _to_plain(value: Any, none: Any = None) -> Any:
    if value is None:
        return none
    if dataclasses.is_dataclass(value):
        return to_tree(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    return value


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_tree(kind, value, where)
    if isinstance(value, Mapping):
        item = (*typing.get_args(kind), Any, Any)[1]
        key = getattr(item, "KEY", None)
        inner = {
            name: {key: name, **entry} if key and isinstance(entry, Mapping) else entry for name, entry in value.items()
        }
        return {name: _from_plain(item, entry, f"{where}{name}.") for name, entry in inner.items()}
    return _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
