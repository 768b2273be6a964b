"""The model that comes with the package: `nano`, in the official Hugging Face layout."""

import os
import pathlib

NANO = "nano"
FOLDER = pathlib.Path(__file__).parents[1] / NANO


def resolve_bundled(source: str | os.PathLike) -> str | os.PathLike:
    """The folder of `nano` for its name; anything else as it is (`./nano` is a folder of the user's)."""
    return FOLDER if source == NANO else source
