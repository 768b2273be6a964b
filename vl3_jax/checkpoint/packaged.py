"""The model that comes with the package: `nano`, in the official Hugging Face layout."""

import os
import pathlib

from vl3_jax.errors import InputError

NANO = "nano"
FOLDER = pathlib.Path(__file__).parents[1] / NANO
_WEIGHTS = "model.safetensors"


def has_weights() -> bool:
    """Whether this package has trained weights of its own."""
    return (FOLDER / _WEIGHTS).is_file()


def resolve(source: str | os.PathLike) -> str | os.PathLike:
    """The folder of `nano` for its name; anything else as it is (`./nano` is a folder of the user's).

    Raises:
      InputError: the package has no trained weights.
    """
    if source != NANO:
        return source
    if not has_weights():
        raise InputError(
            "nano: this package has no trained weights; train them with `vl3 train --config configs/nano_stage0.py "
            "--workdir RUNS/nano0` and the stages after it, or give another --model"
        )
    return FOLDER
