"""The data of a run: its mixture and packing plans, the size of a step, the loader, and batches on the mesh."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import mixtures
from data_pipelines.loader import Batch, Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.packing.packing_plan import PackingPlan
from data_pipelines.sample_builder import SampleBuilder
from vl3_jax.errors import InputError
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.processing.packed_batch import PATCH_DIM, BatchShape
from vl3_jax.storage.disk_space import translate_write_errors
from vl3_jax.storage.durable import atomic_write
from vl3_jax.storage.paths import list_dir, translate_io_errors
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import check_rows, rows_for_samples

PLANS = "rows"  # folder of the packing plans in a workdir
_SAVED_PLANS = 16  # many epochs are those of little data, which are planned faster than files are read
PREFETCH = 2  # batches on the devices besides the one in use
_SUFFIX = ".npz"

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------------ mixtures
def open_data(config: mixtures.MixtureConfig, tokenizer: str) -> MixtureDataset:
    """Opens the data sets of a mixture; missing indices are built here, or beforehand by `vl3 data index`."""
    return _open(mixtures.dataset_specs(config), SampleBuilder(tokenizer, mixtures.data_settings(config)))


def open_held_out(config: RunConfig, mixture: MixtureDataset) -> MixtureDataset | None:
    """Opens the held-out data, with the settings and the root of the training data; None if there is none."""
    specs = held_out_specs(config)
    return _open(specs, mixture.sample_builder) if specs else None


def held_out_specs(config: RunConfig) -> list[DatasetSpec]:
    """Returns the held-out data with their full paths; nothing if there are none."""
    if not config.eval.annotations:
        return []
    files = {name: getattr(config.eval, name) for name in ("annotations", "media", "outside", "remote")}
    return [mixtures.with_full_paths(config.data, DatasetSpec("held out", **files))]


def _open(specs: list[DatasetSpec], sample_builder: SampleBuilder) -> MixtureDataset:
    """Opens data sets; the first process builds missing indices, the others those that it did not build for them."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def bar(name: str, total: int) -> tqdm:
            return stack.enter_context(tqdm(desc=f"index {name}", total=total, unit=" samples", mininterval=1.0))

        def on_progress(name: str, done: int, total: int) -> None:
            bar(name, total).update(done - bar(name, total).n)

        opened = functools.partial(open_mixture, specs, sample_builder, build=True, on_progress=on_progress)
        first = opened() if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("indexed")
        return first or opened()


# ------------------------------------------------------------------------------------------------------- packing plans
def load_plans(mixture: MixtureDataset, workdir: epath.Path) -> set[str]:
    """Gives the mixture the packing plans that an earlier start of the run has saved, except for damaged ones.

    To plan tens of millions of samples takes minutes, which a whole slice would wait for after each preemption.

    Returns:
      The keys of these plans.
    """
    folder, loaded = workdir / PLANS, set()
    with translate_io_errors(folder):
        for name in filter(lambda name: name.endswith(_SUFFIX), list_dir(folder)):
            if (plan := _read_plan(folder / name)) is not None:
                mixture.planned[name.removesuffix(_SUFFIX)] = plan
                loaded.add(name.removesuffix(_SUFFIX))
    return loaded


def save_plans(mixture: MixtureDataset, workdir: epath.Path, loaded: Collection[str] = ()) -> None:
    """Writes the packing plans of a mixture but those that were loaded; the first process does so for all."""
    if jax.process_index():
        return
    folder = workdir / PLANS
    with translate_write_errors(folder):
        if not folder.is_dir():
            folder.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for key, plan in itertools.islice(mixture.planned.items(), _SAVED_PLANS):
            if key not in loaded:
                file = io.BytesIO()
                counts, samples = np.diff(plan.offsets).astype(np.int32), plan.samples.astype(np.int32)
                np.savez(file, counts=counts, samples=samples, lengths=plan.lengths)
                atomic_write(folder / f"{key}{_SUFFIX}", file.getvalue())


def _read_plan(file: epath.Path) -> PackingPlan | None:
    """Reads a packing plan; None, with a warning, if the file is damaged."""
    content = file.read_bytes()
    try:
        arrays = np.load(io.BytesIO(content))
        offsets = np.concatenate([[0], np.cumsum(arrays["counts"], dtype=np.int64)])
        plan = PackingPlan(offsets, arrays["samples"].astype(np.int64), arrays["lengths"])
        if not len(offsets) - 1 == len(plan.lengths) or offsets[-1] != len(plan.samples):
            raise ValueError("its arrays do not fit together")
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error):
        logger.warning("warning: %s is damaged; the packing is planned anew", file)
        return None
    return plan


# --------------------------------------------------------------------------------------------------------------- steps
def rows_per_step(config: RunConfig, mixture: MixtureDataset, mesh: Mesh, recorded: int | None = None) -> int:
    """Returns the rows of a step on all hosts together.

    Args:
      config: Gives them (`batch.rows`), or how many samples they should hold on average (`batch.samples`).
      mixture: Tells how many samples a row holds.
      mesh: Its parts must divide the rows.
      recorded: Rows of a step when the run was started; None for a new run.

    Raises:
      InputError: Mesh or microbatches do not divide the rows, or a step is larger than the memory of this host.
    """
    rows = recorded or config.batch.rows
    if rows:
        check_rows(config.batch, mesh, rows)
    else:
        plan = mixture.epoch_plan(config.seed, 0)
        rows = rows_for_samples(config.batch, mesh, max(len(plan.samples), 1) / max(len(plan), 1))
    _check_memory(mixture.settings.shape, rows)
    return rows


def _check_memory(shape: BatchShape, rows: int) -> None:
    """Raises InputError where the rows of a single step are more than this host can hold."""
    patches = shape.patches * shape.vision_rows
    needed = math.ceil(rows / jax.process_count()) * patches * PATCH_DIM
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"{rows:,} rows of a step, each of {patches:,} patches, take {needed / 2**30:,.0f} GiB of each host, which "
            f"has {memory / 2**30:,.0f}; lower batch.rows, batch.samples or data.patches"
        )


def samples_per_step(config: RunConfig, mixture: MixtureDataset, rows: int) -> float:
    """Returns the samples of a step on average."""
    plan = mixture.epoch_plan(config.seed, 0)
    return rows * len(plan.samples) / max(len(plan), 1)


def total_steps(config: RunConfig, mixture: MixtureDataset, rows: int) -> tuple[int, int]:
    """Returns steps and epochs of the run: `steps` in as many epochs as they take, or those of `epochs`."""
    if not config.steps:
        return len(mixture.step_plan(rows, config.epochs, config.seed)), config.epochs
    return config.steps, mixture.epochs_of(config.steps, rows, config.seed)


# --------------------------------------------------------------------------------------------------------------- loader
def build_loader(
    config: RunConfig,
    mixture: MixtureDataset,
    mesh: Mesh,
    rows: int,
    epochs: int = 1,
    data_state: dict[str, Any] | None = None,
) -> Loader:
    """Builds the loader of this host's part of each step, from `data_state` on."""
    return Loader(
        mixture,
        rows,
        epochs=epochs,
        seed=config.seed,
        rows=local_rows(mesh, rows),
        workers=config.loader.workers,
        threads=config.loader.threads or None,
        state=data_state,
        bad_share=config.loader.bad_share,
        reduce_counts=sum_across_hosts if jax.process_count() > 1 else None,
    )


def local_rows(mesh: Mesh, rows_per_step: int) -> list[int]:
    """Returns the rows of a step that this process's devices hold, ascending.

    They need not follow each other: a TPU host has a block of the torus, and rows go along its axes.
    """
    sharding = batch_shardings({"tokens": jax.ShapeDtypeStruct((rows_per_step, 1), np.int32)}, mesh)["tokens"]
    indices = sharding.addressable_devices_indices_map((rows_per_step, 1)).values()
    return sorted({row for index in indices if index for row in range(*index[0].indices(rows_per_step))})


def prefetch_to_device(batches: Iterable[Batch], mesh: Mesh, rows_per_step: int) -> Iterator[Batch]:
    """Yields the batches with their arrays on the mesh, sharded by rows; the next ones are already being transferred.

    Args:
      batches: Batches of a `Loader` with `rows=local_rows(mesh, rows_per_step)`.
      mesh: The mesh, see `parallel.mesh`.
      rows_per_step: Rows of a step on all hosts together.
    """
    queue: collections.deque[Batch] = collections.deque()
    rows = local_rows(mesh, rows_per_step)

    def on_mesh(array: np.ndarray, shape: tuple[int, ...], sharding: jax.sharding.Sharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(rows_per_step)
            return array[bisect.bisect_left(rows, first) : bisect.bisect_left(rows, last), *index[1:]]

        return jax.make_array_from_callback(shape, sharding, part)

    for batch in batches:
        whole = {
            name: jax.ShapeDtypeStruct((rows_per_step, *array.shape[1:]), array.dtype)
            for name, array in batch.arrays.items()
        }
        arrays = {
            name: on_mesh(batch.arrays[name], whole[name].shape, sharding)
            for name, sharding in batch_shardings(whole, mesh).items()
        }
        queue.append(dataclasses.replace(batch, arrays=arrays))
        if len(queue) > PREFETCH:
            yield queue.popleft()
    yield from queue


def sum_across_hosts(counts: np.ndarray) -> np.ndarray:
    """Sums an array of counts over all processes."""
    return np.asarray(multihost_utils.process_allgather(counts)).reshape(-1, len(counts)).sum(axis=0)
