"""Command-line flags made from the declarations of settings: type, choices, description and default."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vl3_jax import config_tree
from vl3_jax.config_tree import Limits
from vl3_jax.errors import SettingError, printable


def add(group: Any, cls: type, flags: Mapping[str, str], defaults: Mapping[str, str | None] | None = None) -> None:
    """Adds a flag for each of some settings; one that is not given is None in the parsed arguments.

    Args:
      group: Parser or argument group.
      cls: Dataclass that declares the settings.
      flags: Flag of each setting, by the name of its field.
      defaults: What the help names as default instead of the declared one; None for none.
    """
    types, descriptions = config_tree.types(cls), config_tree.descriptions(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, flag in flags.items():
        default = (defaults or {}).get(name, fields[name].default)
        text = descriptions[name].rstrip(".")
        group.add_argument(
            flag,
            type=types[name],
            choices=fields[name].metadata.get(config_tree.CHOICES),
            metavar=None if config_tree.CHOICES in fields[name].metadata else types[name].__name__.upper(),
            help=(text if default is None else f"{text} (default: {_shown(default)})").replace("%", "%%"),
        )


def number(kind: type, limits: Limits) -> Callable[[str], Any]:
    """Returns the `type` of a flag that is no declared setting: an int or a float within limits."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
            config_tree.check_value("", value, kind, {config_tree.LIMITS: limits})
        except (ValueError, SettingError):
            shown = printable(repr(text))
            raise argparse.ArgumentTypeError(f"{shown}; give {config_tree.expected(kind, limits)}") from None
        return value

    return parse


def add_changes(group: Any) -> None:
    """Adds --set, as which the command line's --config.KEY=VALUE arrives."""
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same as --config.KEY=VALUE")


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns those settings of a dataclass whose flags, named after their fields, were given."""
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)
