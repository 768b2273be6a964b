"""Opens a checkpoint of any kind."""

import contextlib
import os
import pathlib
import re
from collections.abc import Collection, Iterator

from etils import epath

from vl3_jax.checkpoint import hub
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.orbax_tree import COMMITTED, METADATA, OrbaxSource
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.storage.paths import is_url, list_dir, resolve

NANO = "nano"  # name of the model bundled with the package, in the official Hugging Face layout
NANO_FOLDER = pathlib.Path(__file__).parents[1] / NANO
_STEPS = "checkpoints"  # folder of a workdir that contains its steps
_ITEMS = ("params", "state", "default", "pytree")  # item names under which a checkpoint manager stores the tree


def open_source(source: str | os.PathLike, base: str | None = None, token: str | None = None) -> CheckpointSource:
    """Opens a checkpoint of any kind without reading its arrays.

    Args:
      source: Orbax folder, training workdir or Hugging Face folder (on a disk or under gs://), Hub id, or "nano"
        (`./nano` is a user's folder).
      base: Base model of an adapter or of a projector-only run, in place of the one that its files name.
      token: Hub token.

    Raises:
      InputError: There is no checkpoint, or its tensors do not fit its configuration.
    """
    source = NANO_FOLDER if source == NANO else source
    tree = find_tree(source)
    return open_hf(source, base=base, token=token) if tree is None else OrbaxSource(source, tree)


@contextlib.contextmanager
def open_tokenizer(source: str | os.PathLike, token: str | None = None) -> Iterator[pathlib.Path]:
    """Yields a tokenizer.json or a local folder that holds one, for as long as the context is open.

    Args:
      source: A tokenizer.json, a folder that holds one, or whatever `open_source` takes. Of a Hub id no weights are
        downloaded.
      token: Hub token.

    Raises:
      InputError: There is no such file, folder or checkpoint.
    """
    path = pathlib.Path(source)
    if os.fspath(source) != NANO and not is_url(source):
        if os.path.isfile(path) or os.path.isfile(path / "tokenizer.json"):
            yield path
            return
        if not os.path.exists(path) and hub.is_hub_id(os.fspath(source)):
            yield hub.download(os.fspath(source), token, weights=False)
            return
    opened = open_source(source, token=token)
    yield opened.files


def find_tree(location: str | os.PathLike) -> epath.Path | None:
    """Finds the folder with `_METADATA`: `location`, an item of a step, or the newest step of a training workdir.

    Args:
      location: Local folder or one under gs://.

    Returns:
      None if there is no such folder, and for other URLs and Hub ids.

    Raises:
      InputError: A gs:// folder cannot be listed, or the clients for gs:// are not installed.
    """
    if is_url(location) and not os.fspath(location).startswith("gs://"):
        return None
    trees = (_tree_in(folder, names) for folder, names in _folders(resolve(location)))
    return next((tree for tree in trees if tree is not None), None)


def _folders(folder: epath.Path) -> Iterator[tuple[epath.Path, Collection[str]]]:
    """Yields the folders that may hold the tree with the names in them: `folder`, then its steps, newest first."""
    names = list_dir(folder)
    yield folder, names
    steps = list_dir(folder / _STEPS) if _STEPS in names else {}
    for parent, children in ((folder / _STEPS, steps), (folder, names)):
        for step in sorted((name for name in children if re.fullmatch(r"\d+", name)), key=int, reverse=True):
            files = list_dir(parent / step)
            # A local step is renamed to its number once complete; under gs:// this file marks it as complete.
            if COMMITTED in files or not is_url(folder):
                yield parent / step, files


def _tree_in(folder: epath.Path, names: Collection[str]) -> epath.Path | None:
    """Returns `folder` or the item in it that contains `_METADATA`."""
    if METADATA in names:
        return folder
    return next((folder / item for item in _ITEMS if item in names and METADATA in list_dir(folder / item)), None)
