"""Eight host devices for the sharding tests and a compilation cache of this run, set before anything imports jax."""

import atexit
import gc
import os
import pathlib
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

ROOT = pathlib.Path(__file__).parents[1]
# The quick tier: modules, and single tests of slower ones, that touch every package in under a minute on two cores.
QUICK = (
    "tests/bench/test_command.py::test_bad_input",
    "tests/checkpoint/test_name_map.py",
    "tests/data_pipelines/synthetic/test_scoring.py",
    "tests/data_pipelines/test_annotations.py",
    "tests/data_pipelines/packing/test_packing_plan.py",
    "tests/data_pipelines/test_sources.py",
    "tests/evaluation/test_scores.py",
    "tests/evaluation/test_tasks.py",
    "tests/inference/test_engine.py::test_sampling",
    "tests/kernels/test_decode.py::test_equal_to_dense_with_freed_slots",
    "tests/kernels/test_dispatch.py::test_block_sizes",
    "tests/kernels/test_dispatch.py::test_selection",
    "tests/kernels/test_dispatch.py::test_unsupported",
    "tests/launch/test_gke.py",
    "tests/launch/test_xla_flags.py",
    "tests/model/test_attention.py::test_queries_without_keys",
    "tests/model/test_config.py",
    "tests/planning/test_program_cost.py",
    "tests/parallel/test_processes.py",
    "tests/parallel/test_topologies.py",
    "tests/planning/test_plan_cache.py",
    "tests/planning/test_search.py::test_the_smallest_change",
    "tests/processing/test_chat_template.py",
    "tests/processing/test_frame_selection.py",
    "tests/processing/test_images.py",
    "tests/processing/test_loss_weights.py",
    "tests/processing/test_packed_batch.py",
    "tests/processing/test_patchify.py",
    "tests/test_config_file.py",
    "tests/test_logs.py",
    "tests/test_package.py::test_bad_input",
    "tests/test_package.py::test_help",
    "tests/test_package.py::test_import",
    "tests/test_settings.py",
    "tests/training/test_flops.py",
    "tests/training/test_groups.py",
    "tests/training/test_packing_plans.py",
)


def pytest_ignore_collect(collection_path, config):
    """With `-m quick`, leaves the other modules unread: importing them all takes longer than the tests."""
    if config.option.markexpr != "quick" or collection_path.suffix != ".py":
        return None
    name = collection_path.relative_to(ROOT).as_posix()
    return None if any(entry.partition("::")[0] == name for entry in QUICK) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks the tests of the quick tier. Refuses entries that no longer name a test, where whole modules are run."""
    for item in items:
        if item.nodeid.startswith(QUICK) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    modules = {item.nodeid.partition("::")[0] for item in items}
    whole = not any("::" in argument for argument in config.args)
    for entry in QUICK:
        module = entry.partition("::")[0]
        found = any(item.nodeid.startswith(entry) for item in items)
        if not (ROOT / module).exists() or (whole and module in modules and not found):
            raise pytest.UsageError(f"{__file__}: QUICK names {entry}, which is not there")


@pytest.fixture(scope="session")
def gcs():
    """The server that gs:// addresses, in this process and in those it starts."""
    pytest.importorskip("gcsfs")
    with FakeGcs() as server, server.environment():
        yield server


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """Drops the compiled programs of a module: each takes memory maps, of which a process may have only 65,530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()
