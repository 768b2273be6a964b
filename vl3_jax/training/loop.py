"""A training run from top to bottom: mesh, data, model, state, loop."""

import collections
import contextlib
from typing import Any

import jax
from etils import epath

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
from vl3_jax.training.packing_plans import load_plans, save_plans
from vl3_jax.training.parameter_overview import parameter_overview
from vl3_jax.training.preemption import PreemptionHandler
from vl3_jax.training.run_config import ProfileConfig, RunConfig
from vl3_jax.training.setup import build_train_setup

PROFILE = "profile"


class NotFiniteError(RuntimeError):
    """Loss or gradient became infinite or undefined. Nothing after that step is kept."""


def train(config: RunConfig, workdir: str) -> int:
    """Trains, or resumes the run in `workdir`, until its last step or a signal.

    Args:
      config: Configuration of the run.
      workdir: Folder or gs:// URL; new, or of the same run.

    Returns:
      The number of steps done.

    Raises:
      InputError: Configuration, data or workdir do not fit; one line.
      NotFiniteError: Loss or gradient became infinite or undefined.
      TooManyBadSamplesError, DataWorkerError: Raised by the data.
    """
    workdir = paths.resolve(workdir)
    with contextlib.ExitStack() as stack:
        # -------------------------------------------------------------------------------------------- mesh and data
        preflight.check(config, workdir)
        recorded = recorded_rows(workdir, config)
        mesh = make_mesh(vars(config.mesh))
        init = resolve_init(config)
        tokenizer = stack.enter_context(init.local_files())
        mixture = train_data.open_data(config.data, tokenizer)
        load_plans(mixture, workdir)
        rows = train_data.rows_per_step(config, mixture, mesh, recorded)
        total, epochs = train_data.total_steps(config, mixture, rows)

        # ------------------------------------------------------------------------------------------------------ model
        setup = build_train_setup(config, init.model_config, mesh, rows, total, len(mixture.tasks))

        # ------------------------------------------------------------------------------------------------------ state
        prepare_workdir(workdir, config, init, rows)
        save_plans(mixture, workdir)
        has_adapters = config.lora.rank > 0
        checkpoints = Checkpoints(workdir, setup.optimizer, config.checkpoint, has_adapters)
        stack.callback(checkpoints.close)
        done = checkpoints.latest or 0
        writer = MetricWriter(workdir, total, done, jax.process_index() == 0, config.log.tensorboard)
        stack.callback(writer.close)
        if done >= total:
            writer.log(f"{workdir}: all {total} steps are done")
            return done
        writer.log(parameter_overview(mesh, mixture, setup, config.seed, rows, total))
        stack.enter_context(jax.set_mesh(mesh))
        state = data_state = None
        if not done or has_adapters:
            shardings = setup.shardings
            params = init.params(lora.remove_adapters(shardings.params), config.seed)
            state = jax.jit(setup.init_state, out_shardings=shardings, donate_argnums=0)(params)
            del params
        if done:
            state, data_state = checkpoints.restore(done, setup.abstract_state, state), checkpoints.data_state(done)

        # ------------------------------------------------------------------------------------------------------- loop
        loader = stack.enter_context(train_data.build_loader(config, mixture, mesh, rows, epochs, data_state))
        evaluator = Evaluator(config, setup.model, mixture, mesh, rows)
        step_flops = StepFlops(init.model_config, config.optimizer.learning_rates, config.lora.rank)
        metrics = MetricAccumulator(step_flops, mixture.tasks, mesh)
        batches = device_feed.prefetch_to_device(metrics.observe(loader), mesh, rows)
        preemption = stack.enter_context(PreemptionHandler())
        pending_metrics: collections.deque[tuple[Batch, Any]] = collections.deque()
        step = done
        while step < total:
            batch = metrics.next_batch(batches)
            with _profiled(config.profile, workdir, step):
                state, step_metrics = setup.step(state, batch.arrays)
            step += 1
            pending_metrics.append((batch, step_metrics))
            stopping = preemption.should_stop(step)
            last = step == total or stopping
            logging, saving = last or step % config.log.every == 0, last or checkpoints.is_due(step)
            # One step behind, so that the devices never wait for the host; up to date before metrics or state are kept.
            while len(pending_metrics) > (0 if logging or saving else 1):
                metrics.add(*_check_finite(*pending_metrics.popleft(), mixture))
            writer.step(step)
            if logging:
                writer.write(step, metrics.summary(loader.log))
            if saving:
                checkpoints.save(step, state, batch.state)
            if evaluator.is_due(step):
                writer.write(step, evaluator.measure(state.params))
                metrics.reset()
            if stopping and step < total:
                writer.log(f"stopped after step {step} of {total}; run the same command to resume")
                break
        checkpoints.wait()
        return step


def _check_finite(batch: Batch, metrics: Any, mixture: MixtureDataset) -> tuple[Batch, Any]:
    """Fetches the metrics of a step to the host. Raises NotFiniteError, which names the samples of the step."""
    metrics = jax.device_get(metrics)
    if not metrics["finite"]:
        numbers = batch.samples[batch.samples >= 0].tolist()
        names = [f"{dataset.spec.name} #{local + 1}" for dataset, local in map(mixture.locate, numbers[:8])]
        raise NotFiniteError(
            f"step {batch.step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; its samples are "
            f"{', '.join(names)}{' ...' if len(numbers) > 8 else ''}. Lower the learning rate or inspect them, and "
            "resume from the last checkpoint"
        )
    return batch, metrics


@contextlib.contextmanager
def _profiled(config: ProfileConfig, workdir: epath.Path, step: int):
    """Traces some steps, for TensorBoard or Perfetto."""
    if config.steps and step == config.start:
        jax.profiler.start_trace(str(workdir / PROFILE))
    yield
    if config.steps and step == config.start + config.steps - 1:
        jax.effects_barrier()
        jax.profiler.stop_trace()
