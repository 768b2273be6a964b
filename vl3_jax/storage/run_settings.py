"""The settings of a run beside its results, so that results of different settings are never mixed."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.durable import atomic_write
from vl3_jax.storage.locks import hold


def check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Compares the settings of a run with those of the earlier runs that wrote to the same place, or saves them.

    Args:
      path: Local file of the settings, in a folder that exists.
      settings: JSON values by name.

    Raises:
      InputError: The file has other settings, and the message names the first one, or is no file of settings.
    """
    with hold(path.parent, f".{path.name}.lock", wait=True):  # several processes may begin at once
        if not path.exists():
            atomic_write(path, (json.dumps(settings, indent=1) + "\n").encode())
        content = path.read_text(encoding="utf-8", errors="replace")
    try:
        saved = json.loads(content)
        changed = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not the settings of a run; give another --out") from None
    if changed:
        name, before, now = changed[0], saved.get(changed[0]), settings.get(changed[0])
        difference = f"{name}: {before!r} there, {now!r} now"
        raise InputError(f"{path.parent}: holds answers of another run ({difference}); give another --out")
