"""Locates `nano`, the model bundled with the package in the official Hugging Face layout."""

import os
import pathlib

NANO = "nano"
FOLDER = pathlib.Path(__file__).parents[1] / NANO


def resolve_bundled(source: str | os.PathLike) -> str | os.PathLike:
    """Returns the bundled folder for the name "nano" and any other source unchanged (`./nano` is a user's folder)."""
    return FOLDER if source == NANO else source
