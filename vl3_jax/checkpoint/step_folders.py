"""The folders of a run's steps: which of them are complete, and what is wrong with one.

A folder that was complete may be damaged later: by a power cut, a disk, a copy that was cut short. What names, sizes
and small files show is found here at little cost; the rest shows when the arrays are read.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Collection

from etils import epath

from vl3_jax.storage.paths import is_url, list_dir

METADATA = "_METADATA"
COMMITTED = "commit_success.txt"
STEP_METADATA = "_CHECKPOINT_METADATA"
_MANIFEST = "manifest.ocdbt"
_OCDBT_FOLDERS = re.compile(r"d|ocdbt\.process_\d+")
_ASIDE = "damaged"  # ending of a folder that is put aside


def steps_in(folder: epath.Path, names: Collection[str] | None = None) -> list[epath.Path]:
    """Returns the folders of the steps that have been written completely, newest first.

    A local folder is renamed to the number of its step once it is complete; under gs:// a file marks it as complete.

    Args:
      folder: Folder of the steps, local or under gs://.
      names: The names in it, where they are known.
    """
    names = list_dir(folder) if names is None else names
    steps = [folder / name for name in names if re.fullmatch(r"\d+", name)]
    newest_first = sorted(steps, key=lambda step: int(step.name), reverse=True)
    return [step for step in newest_first if not is_url(folder) or COMMITTED in list_dir(step)]


def step_damage(step: epath.Path, trees: Collection[str], objects: Collection[str]) -> str:
    """Returns what is wrong with the folder of a step, as far as it shows without reading arrays; empty if nothing is.

    Args:
      step: Folder of a step, local or under gs://.
      trees: Items that hold arrays.
      objects: Items that hold a JSON object.
    """
    if not step.is_dir():
        return "no folder"
    names = list_dir(step)
    if not names:
        return "an empty folder"
    if missing := [name for name in (STEP_METADATA, *trees, *objects) if name not in names]:
        return f"{missing[0]} is missing"
    files = (step / STEP_METADATA, *(step / item / "metadata" for item in objects))
    damages = itertools.chain(map(_json_damage, files), (tree_damage(step / item) for item in trees))
    return next((damage.removeprefix(f"{step}/") for damage in damages if damage), "")


def tree_damage(tree: epath.Path) -> str:
    """Returns what is wrong with a folder of arrays, with its path, as far as it shows without reading them."""
    names = list_dir(tree)
    if damage := _json_damage(tree / METADATA):
        return damage
    folders = [name for name in names if _OCDBT_FOLDERS.fullmatch(name)]
    if not folders and _MANIFEST not in names:
        return ""  # each array is a folder
    if not names.get(_MANIFEST):
        return f"{tree / _MANIFEST} is {'empty' if _MANIFEST in names else 'missing'}"
    for folder in (tree / name if name == "d" else tree / name / "d" for name in ("d", *folders)):
        files = list_dir(folder)
        if not files:
            return f"{folder} is missing or empty"
        if empty := [name for name, size in files.items() if not size]:
            return f"{folder / empty[0]} is empty"
    return ""


def put_aside(step: epath.Path) -> epath.Path:
    """Renames the folder of a step, so that it counts no more, and returns its new path."""
    names, name = list_dir(step.parent), f"{step.name}.{_ASIDE}"
    number = next(n for n in range(1, len(names) + 2) if (f"{name}.{n}" if n > 1 else name) not in names)
    return step.rename(step.parent / (f"{name}.{number}" if number > 1 else name))


def _json_damage(file: epath.Path) -> str:
    """Returns what is wrong with a file that should hold a JSON object."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{file} is missing"
    with contextlib.suppress(ValueError):
        if isinstance(json.loads(content), dict):
            return ""
    return f"{file} is {'damaged' if content else 'empty'}"
