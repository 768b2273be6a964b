"""Errors of paths are translated to one line."""

import pytest

from vl3_jax.errors import InputError
from vl3_jax.storage import paths


def test_connection_errors_are_translated():
    import aiohttp

    with (
        pytest.raises(InputError, match="cannot be reached; check the network"),
        paths.translate_io_errors("gs://models/model"),
    ):
        raise aiohttp.ServerDisconnectedError
    with pytest.raises(FileNotFoundError), paths.translate_io_errors("/models/model"):
        raise FileNotFoundError
