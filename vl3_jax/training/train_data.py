"""The data of a run: its corpus, how many rows make a step, how many steps there are."""

import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines import mixtures
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, open_mixture
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.step_plan import StepPlan
from vl3_jax.training import device_feed
from vl3_jax.training.rows import check_rows, rows_for_samples


def open_data(config: ConfigDict, tokenizer: str) -> MixtureDataset:
    """The data sets of a configuration; indices that are missing are made (`vl3 data index` does so beforehand)."""
    return _opened(mixtures.dataset_specs(config.data), SampleBuilder(tokenizer, mixtures.data_settings(config.data)))


def open_held_out(config: ConfigDict, mixture: MixtureDataset) -> MixtureDataset | None:
    """The data that is only looked at, under the settings of training; None if there is none."""
    if not config.eval.annotations or not config.eval.every:
        return None
    spec = DatasetSpec("held out", tuple(config.eval.annotations), config.eval.media)
    return _opened([spec], mixture.examples)


def rows_per_step(config: ConfigDict, mixture: MixtureDataset, mesh: Mesh, before: int | None = None) -> int:
    """Rows on all hosts together.

    Args:
      config: gives them (`batch.rows`), or how many samples they should hold on average (`batch.samples`).
      corpus: tells how many samples a row holds.
      mesh: what it splits rows into divides them.
      before: what they came to when this run began.

    Raises:
      InputError: the mesh, or accumulation, does not divide the rows.
    """
    given = before or config.batch.rows
    if given:
        check_rows(config, mesh, given)
        return given
    rows = mixture.epoch_plan(config.seed, 0)
    return rows_for_samples(config, mesh, max(len(rows.samples), 1) / max(len(rows), 1))


def total_steps(config: ConfigDict, mixture: MixtureDataset, rows: int) -> tuple[int, int]:
    """Steps and epochs: `config.steps`, in as many epochs as that takes, or those of `config.epochs`."""
    if not config.steps:
        return len(StepPlan(mixture, rows, config.epochs, config.seed)), config.epochs
    epochs = 1
    while len(StepPlan(mixture, rows, epochs, config.seed)) < config.steps:
        epochs += 1
    return config.steps, epochs


def build_loader(
    config: ConfigDict,
    mixture: MixtureDataset,
    mesh: Mesh,
    rows: int,
    epochs: int = 1,
    place: dict[str, Any] | None = None,
) -> Loader:
    """Reads this host's part of each step, from `place` on."""
    return Loader(
        mixture,
        rows,
        epochs=epochs,
        seed=config.seed,
        rows=device_feed.local_rows(mesh, rows),
        workers=config.loader.workers,
        threads=config.loader.threads or None,
        state=place,
        bad_share=config.loader.bad_share,
        reduce_counts=device_feed.sum_across_hosts if jax.process_count() > 1 else None,
    )


def _opened(specs: list[DatasetSpec], examples: SampleBuilder) -> MixtureDataset:
    """Opens data sets; the first process indexes what is not indexed, the others where it did not do so for them."""
    bars: dict[str, tqdm] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(desc=f"index {name}", total=total, unit=" samples", mininterval=1.0)
        bars[name].update(done - bars[name].n)

    def opened() -> MixtureDataset:
        return open_mixture(specs, examples, build=True, on_progress=progress)

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [bar.close() for bar in bars.values()])
        first = opened() if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("indexed")
        return first or opened()
