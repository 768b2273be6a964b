"""Eight host devices for the sharding tests and a compilation cache of this run, set before anything imports jax."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

from support.fake_gcs import FakeGcs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Commands that the tests run one after another compile the same small programs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vl3_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def gcs():
    """The server that gs:// leads to, in this process and in those it starts."""
    pytest.importorskip("gcsfs")
    with FakeGcs() as server, server.environment():
        yield server


@pytest.fixture(scope="module", autouse=True)
def no_more_programs_than_needed():
    """Each compiled program takes memory maps, of which a process may have 65,530: enough for part of the tests."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
