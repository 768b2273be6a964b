"""Makes `sample_datasets` importable: the folder has the name of the package under test, so it cannot be a package."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with the media of `sample_datasets`; modules that need more in it extend it."""
    from sample_datasets import write_media

    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
    return folder
