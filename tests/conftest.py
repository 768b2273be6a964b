"""Eight host devices for the sharding tests and a compilation cache of this run, set before anything imports jax."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

from support.fake_gcs import FakeGcs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE_PREFIX = "vl3_jax_tests_"
# The workers of pytest-xdist inherit the variables of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ or CACHE_PREFIX not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if os.environ.get("VL3_SLOW") != "1" and importlib.metadata.version("jaxlib").startswith("0.10."):
        # Compiles in two thirds of the time. The slow tier runs what users run; later versions have no choice.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    # Modules, workers and the commands that tests start compile the same small programs, each of them once.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=CACHE_PREFIX)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ROOT = pathlib.Path(__file__).parents[1]
# The quick tier: modules, and single tests of slower ones, that touch every package in under a minute on two cores.
QUICK = (
    "tests/batch/test_answer_parts.py",
    "tests/bench/test_command.py::test_bad_input",
    "tests/checkpoint/test_name_map.py",
    "tests/data_pipelines/synthetic/test_scoring.py",
    "tests/data_pipelines/test_annotations.py",
    "tests/data_pipelines/packing/test_packing_plan.py",
    "tests/data_pipelines/test_sources.py",
    "tests/evaluation/test_synthetic.py",
    "tests/evaluation/test_vectors.py",
    "tests/inference/test_sampling.py",
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

# The modules that take longest, the longest first: a worker that began one of them last would end after the others.
LONGEST = (
    "tests/training/test_train.py",
    "tests/cli/test_ask.py",
    "tests/bench/test_command.py",
    "tests/launch/test_nano.py",
    "tests/training/test_sharded_training.py",
    "tests/inference/test_end_to_end_parity.py",
    "tests/inference/test_engine.py",
    "tests/planning/test_cli.py",
    "tests/parallel/test_sharding.py",
    "tests/training/test_gcs.py",
    "tests/evaluation/test_runner.py",
    "tests/training/test_step.py",
    "tests/training/test_loss.py",
    "tests/kernels/test_decode.py",
)


def pytest_configure(config):
    """Keeps the order of the modules, where pytest-xdist would begin with those of the most tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_ignore_collect(collection_path, config):
    """With `-m quick`, leaves the other modules unread: importing them all takes longer than the tests."""
    if config.option.markexpr != "quick" or collection_path.suffix != ".py":
        return None
    name = collection_path.relative_to(ROOT).as_posix()
    return None if any(entry.partition("::")[0] == name for entry in QUICK) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Puts the longest modules first and marks the tests of the quick tier.

    Refuses modules that are not there, and entries of the quick tier that name no test where whole modules are run.
    """
    rank = {module: index for index, module in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
    for item in items:
        if item.nodeid.startswith(QUICK) and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
    for module in LONGEST:
        if not (ROOT / module).exists():
            raise pytest.UsageError(f"{__file__}: LONGEST names {module}, which is not there")
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


@pytest.fixture(scope="module")
def fast_compile():
    """Compiles without XLA optimisation, here and in child processes: for programs that run for a moment only."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
