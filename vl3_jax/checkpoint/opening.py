"""Opens a checkpoint of any kind."""

import contextlib
import itertools
import logging
import os
import pathlib
from collections.abc import Collection, Iterator

from etils import epath

from vl3_jax.checkpoint import hub
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.orbax_tree import MODEL_INFO, OrbaxSource
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.step_folders import METADATA, steps_in, tree_damage
from vl3_jax.errors import InputError
from vl3_jax.storage.paths import is_url, list_dir, resolve

NANO = "nano"  # name of the model bundled with the package, in the official Hugging Face layout
NANO_FOLDER = pathlib.Path(__file__).parents[1] / NANO
_STEPS = "checkpoints"  # folder of a workdir that contains its steps
_ITEMS = ("params", "state", "default", "pytree")  # item names under which a checkpoint manager stores the tree


logger = logging.getLogger(__name__)


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

    A step whose files are damaged is left out with a warning.

    Args:
      location: Local folder or one under gs://.

    Returns:
      None if there is no such folder, and for other URLs and Hub ids.

    Raises:
      InputError: A gs:// folder cannot be listed, the clients for gs:// are not installed, or all steps are damaged.
    """
    if is_url(location) and not os.fspath(location).startswith("gs://"):
        return None
    folder, damages = resolve(location), []
    names = list_dir(folder)
    if (tree := _tree_in(folder, names)) is not None:
        return tree
    steps = steps_in(folder / _STEPS) if _STEPS in names else []
    for step in itertools.chain(steps, steps_in(folder, names)):
        tree = _tree_in(step, list_dir(step))
        damage = "its parameters are missing" if tree is None else tree_damage(tree)
        if tree is not None and not damage:
            for path, text in damages:
                logger.warning("warning: %s is damaged (%s); reading %s instead", path, text, step)
            return tree
        if tree is not None or MODEL_INFO in names:
            damages.append((step, damage.removeprefix(f"{step}/")))
    if damages:
        raise InputError(f"{damages[0][0]}: damaged ({damages[0][1]}), and no older step is whole; restore the folder")
    return None


def _tree_in(folder: epath.Path, names: Collection[str]) -> epath.Path | None:
    """Returns `folder` or the item in it that contains `_METADATA`."""
    if METADATA in names:
        return folder
    return next((folder / item for item in _ITEMS if item in names and METADATA in list_dir(folder / item)), None)
