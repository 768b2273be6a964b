"""A training run as one reads it, from top to bottom: mesh, data, model, state, loop."""

import collections
import contextlib
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.loader import Batch
from data_pipelines.mixture_dataset import MixtureDataset
from vl3_jax.checkpoint import paths
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.training import device_feed, lora, preflight, train_data
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.evaluator import Evaluator
from vl3_jax.training.flops import StepFlops
from vl3_jax.training.init import prepare_workdir, recorded_rows, resolve_init
from vl3_jax.training.metric_writer import MetricWriter
from vl3_jax.training.metrics import MetricAccumulator
from vl3_jax.training.packing_plans import load_plan, save_plan
from vl3_jax.training.parameter_overview import parameter_overview
from vl3_jax.training.preemption import PreemptionHandler
from vl3_jax.training.setup import build_train_setup

PROFILE = "profile"


class NotFiniteError(RuntimeError):
    """Loss or gradient became infinite or undefined. Nothing after that step is kept."""


def train(config: ConfigDict, workdir: str) -> int:
    """Trains, or goes on with what is in `workdir`, until the steps are done or a signal ends it.

    Args:
      config: from `training_config`.
      workdir: a folder or gs:// URL; new, or of the same run.

    Returns:
      Steps done.

    Raises:
      InputError: configuration, data or workdir do not fit; one line.
      NotFiniteError: see there.
      TooManyBadSamplesError, DataWorkerError: from the data.
    """
    workdir = paths.resolve(workdir)
    with contextlib.ExitStack() as stack:
        # -------------------------------------------------------------------------------------------- mesh and data
        preflight.check(config, workdir)
        rows_before = recorded_rows(workdir, config)
        mesh = make_mesh(dict(config.mesh))
        begin = resolve_init(config)
        tokenizer = stack.enter_context(begin.local_files())
        mixture = train_data.open_data(config, tokenizer)
        load_plan(mixture, workdir)
        rows = train_data.rows_per_step(config, mixture, mesh, rows_before)
        total, epochs = train_data.total_steps(config, mixture, rows)

        # ------------------------------------------------------------------------------------------------------ model
        program = build_train_setup(config, begin.model, mesh, rows, total, len(mixture.tasks))

        # ------------------------------------------------------------------------------------------------------ state
        prepare_workdir(workdir, config, begin, rows)
        save_plan(mixture, workdir)
        adapted = config.lora.rank > 0
        keeping = config.checkpoint
        checkpoints = Checkpoints(workdir, program.optimizer, keeping.every, keeping.keep, adapted)
        stack.callback(checkpoints.close)
        done = checkpoints.latest or 0
        reporter = MetricWriter(workdir, total, done, jax.process_index() == 0, config.log.tensorboard)
        stack.callback(reporter.close)
        if done >= total:
            reporter.say(f"{workdir}: all {total} steps are done")
            return done
        reporter.say(parameter_overview(config, mesh, mixture, program, rows, total))
        stack.enter_context(jax.set_mesh(mesh))
        state = place = None
        if not done or adapted:
            shardings = program.shardings
            params = begin.params(lora.remove_adapters(shardings.params), config.seed)
            state = jax.jit(program.fresh, out_shardings=shardings, donate_argnums=0)(params)
            del params
        if done:
            state, place = checkpoints.restore(done, program.target, state), checkpoints.place(done)

        # ------------------------------------------------------------------------------------------------------- loop
        loader = stack.enter_context(train_data.build_loader(config, mixture, mesh, rows, epochs, place))
        held_out = Evaluator(config, program.model, mixture, mesh, rows)
        tally = MetricAccumulator(
            StepFlops(begin.model, dict(config.optimizer.learning_rates), config.lora.rank), mixture.tasks, mesh
        )
        batches = device_feed.prefetch_to_device(tally.watched(loader), mesh, rows)
        stop = stack.enter_context(PreemptionHandler())
        pending_metrics: collections.deque[tuple[Batch, Any]] = collections.deque()
        step = done
        while step < total:
            batch = tally.wait(batches)
            with _profiled(config, workdir, step):
                state, metrics = program.step(state, batch.arrays)
            step += 1
            pending_metrics.append((batch, metrics))
            stopping = stop.after(step)
            last = step == total or stopping
            reporting, saving = last or step % config.log.every == 0, last or checkpoints.due(step)
            # One step behind, so that the devices never wait for the host; up to date before anything is told or kept.
            while len(pending_metrics) > (0 if reporting or saving else 1):
                tally.add(*_finite(*pending_metrics.popleft(), mixture))
            reporter.step(step)
            if reporting:
                reporter.report(step, tally.report(loader.log))
            if saving:
                checkpoints.save(step, state, batch.state)
            if held_out.due(step):
                reporter.report(step, held_out.measure(state.params))
                tally.restart()
            if stopping and step < total:
                reporter.say(f"stopped after step {step} of {total}; the same command goes on")
                break
        checkpoints.wait()
        return step


def _finite(batch: Batch, metrics: Any, mixture: MixtureDataset) -> tuple[Batch, Any]:
    """The metrics on the host. NotFiniteError names the samples of the step."""
    metrics = jax.device_get(metrics)
    if not metrics["finite"]:
        numbers = batch.samples[batch.samples >= 0].tolist()
        names = [f"{dataset.spec.name} #{local + 1}" for dataset, local in map(mixture.locate, numbers[:8])]
        raise NotFiniteError(
            f"step {batch.step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; its samples are "
            f"{', '.join(names)}{' ...' if len(numbers) > 8 else ''}. Lower the rate or look at them, and go on from "
            "the last checkpoint"
        )
    return batch, metrics


@contextlib.contextmanager
def _profiled(config: ConfigDict, workdir: epath.Path, step: int):
    """A trace of some steps, for TensorBoard or Perfetto."""
    first, count = config.profile.start, config.profile.steps
    if count and step == first:
        jax.profiler.start_trace(str(workdir / PROFILE))
    yield
    if count and step == first + count - 1:
        jax.effects_barrier()
        jax.profiler.stop_trace()
