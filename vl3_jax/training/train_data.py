"""The data of a run: its mixture, the rows of a step, the number of steps, and the loader."""

import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from data_pipelines import mixtures
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.step_plan import StepPlan
from vl3_jax.training import device_feed
from vl3_jax.training.rows import check_rows, rows_for_samples
from vl3_jax.training.run_config import EvalConfig, RunConfig


def open_data(config: mixtures.MixtureConfig, tokenizer: str) -> MixtureDataset:
    """Opens the data sets of a mixture; missing indices are built here, or beforehand by `vl3 data index`."""
    return _open(mixtures.dataset_specs(config), SampleBuilder(tokenizer, mixtures.data_settings(config)))


def open_held_out(config: EvalConfig, mixture: MixtureDataset) -> MixtureDataset | None:
    """Opens the held-out data, with the settings of the training data; None if there is none."""
    if not config.annotations or not config.every:
        return None
    return _open([DatasetSpec("held out", config.annotations, config.media)], mixture.sample_builder)


def rows_per_step(config: RunConfig, mixture: MixtureDataset, mesh: Mesh, recorded: int | None = None) -> int:
    """Returns the rows of a step on all hosts together.

    Args:
      config: Gives them (`batch.rows`), or how many samples they should hold on average (`batch.samples`).
      mixture: Tells how many samples a row holds.
      mesh: Its parts must divide the rows.
      recorded: Rows of a step when the run was started; None for a new run.

    Raises:
      InputError: Mesh or microbatches do not divide the rows.
    """
    rows = recorded or config.batch.rows
    if rows:
        check_rows(config.batch, mesh, rows)
        return rows
    plan = mixture.epoch_plan(config.seed, 0)
    return rows_for_samples(config.batch, mesh, max(len(plan.samples), 1) / max(len(plan), 1))


def total_steps(config: RunConfig, mixture: MixtureDataset, rows: int) -> tuple[int, int]:
    """Returns steps and epochs of the run: `steps` in as many epochs as they take, or those of `epochs`."""
    if not config.steps:
        return len(StepPlan(mixture, rows, config.epochs, config.seed)), config.epochs
    epochs = 1
    while len(StepPlan(mixture, rows, epochs, config.seed)) < config.steps:
        epochs += 1
    return config.steps, epochs


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
        rows=device_feed.local_rows(mesh, rows),
        workers=config.loader.workers,
        threads=config.loader.threads or None,
        state=data_state,
        bad_share=config.loader.bad_share,
        reduce_counts=device_feed.sum_across_hosts if jax.process_count() > 1 else None,
    )


def _open(specs: list[DatasetSpec], sample_builder: SampleBuilder) -> MixtureDataset:
    """Opens data sets; the first process builds missing indices, the others those that it did not build for them."""
    bars: dict[str, tqdm] = {}

    def on_progress(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(desc=f"index {name}", total=total, unit=" samples", mininterval=1.0)
        bars[name].update(done - bars[name].n)

    def opened() -> MixtureDataset:
        return open_mixture(specs, sample_builder, build=True, on_progress=on_progress)

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [bar.close() for bar in bars.values()])
        first = opened() if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("indexed")
        return first or opened()
