"""A tiny random model for the tests of this folder."""

import pytest

import vl3_jax as vl3
from support.checkpoints import write_small_checkpoint


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return vl3.load(write_small_checkpoint(tmp_path_factory.mktemp("evaluation") / "small"))
