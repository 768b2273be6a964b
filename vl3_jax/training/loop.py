"""A training run as one reads it, from top to bottom: mesh, data, model, state, loop."""

import collections
import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from data_pipelines import devices
from data_pipelines.corpus import Corpus
from data_pipelines.loader import Batch
from vl3_jax.model import VideoLLaMA3, abstract_params
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.training import data, lora
from vl3_jax.training.beginning import find_beginning, prepare_workdir, recorded_rows
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.description import describe
from vl3_jax.training.evaluation import HeldOut
from vl3_jax.training.flops import StepFlops
from vl3_jax.training.optimizer import OptimizerSettings, make_optimizer
from vl3_jax.training.reporting import Reporter
from vl3_jax.training.state import new_state, state_shardings
from vl3_jax.training.step import make_train_step
from vl3_jax.training.stopping import StopRequest
from vl3_jax.training.tally import Tally

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
      TooManyProblemsError, DataWorkerError: from the data.
    """
    workdir = epath.Path(workdir)
    with contextlib.ExitStack() as stack:
        # -------------------------------------------------------------------------------------------- mesh and data
        rows_before = recorded_rows(workdir, config)
        mesh = make_mesh(dict(config.mesh))
        begin = find_beginning(config)
        tokenizer = stack.enter_context(begin.local_files())
        corpus = data.open_data(config, tokenizer)
        rows = data.rows_of_a_step(config, corpus, mesh, rows_before)
        total, epochs = data.steps_of_the_run(config, corpus, rows)

        # ---------------------------------------------------------------------------------------- model and optimizer
        model = VideoLLaMA3(
            begin.model, jnp.dtype(config.dtype), jnp.dtype(config.param_dtype), config.remat.vision, config.remat.text
        )
        adapt = _adapters(config)
        shapes = jax.eval_shape(adapt, abstract_params(begin.model, config.param_dtype))
        optimizer = make_optimizer(_optimizer_settings(config, total), shapes)
        fresh = functools.partial(
            new_state, optimizer, param_dtype=config.param_dtype, frozen_dtype=config.frozen_dtype
        )
        target = jax.eval_shape(fresh, shapes)
        shardings = state_shardings(target, begin.model, mesh)

        # ------------------------------------------------------------------------------------------------------ state
        prepare_workdir(workdir, config, begin, rows)
        adapted = config.lora.rank > 0
        keeping = config.checkpoint
        checkpoints = Checkpoints(workdir, optimizer, keeping.every, keeping.keep, adapted)
        stack.callback(checkpoints.close)
        done = checkpoints.latest or 0
        reporter = Reporter(workdir, total, done, jax.process_index() == 0, config.log.tensorboard)
        stack.callback(reporter.close)
        if done >= total:
            reporter.say(f"{workdir}: all {total} steps are done")
            return done
        reporter.say(describe(config, mesh, corpus, optimizer, target, shardings, rows, total))
        stack.enter_context(jax.set_mesh(mesh))
        state = place = None
        if not done or adapted:
            params = begin.params(lora.remove_adapters(shardings.params), config.seed)
            state = jax.jit(lambda params: fresh(adapt(params)), out_shardings=shardings, donate_argnums=0)(params)
            del params
        if done:
            target = jax.tree.map(_placed, target, shardings)
            state, place = checkpoints.restore(done, target, state), checkpoints.place(done)
        train_step = make_train_step(
            model,
            optimizer,
            accumulation=config.batch.accumulation,
            tasks=len(corpus.tasks),
            shardings=shardings,
        )

        # ------------------------------------------------------------------------------------------------------- loop
        loader = stack.enter_context(data.loader_of(config, corpus, mesh, rows, epochs, place))
        held_out = HeldOut(config, model, corpus, mesh, rows)
        tally = Tally(StepFlops(begin.model, optimizer.settings.rates, config.lora.rank), corpus.tasks, mesh)
        batches = devices.to_devices(tally.watched(loader), mesh, rows)
        stop = stack.enter_context(StopRequest())
        unseen: collections.deque[tuple[Batch, Any]] = collections.deque()
        step = done
        while step < total:
            batch = tally.wait(batches)
            with _profiled(config, workdir, step):
                state, metrics = train_step(state, batch.arrays)
            step += 1
            unseen.append((batch, metrics))
            stopping = stop.after(step)
            last = step == total or stopping
            reporting, saving = last or step % config.log.every == 0, last or checkpoints.due(step)
            # One step behind, so that the devices never wait for the host; up to date before anything is told or kept.
            while len(unseen) > (0 if reporting or saving else 1):
                tally.add(*_finite(*unseen.popleft(), corpus))
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


def _adapters(config: ConfigDict):
    """Params -> params, with adapters where there are to be any."""
    if not config.lora.rank:
        return lambda params: params
    key = jax.random.key(config.seed)
    return lambda params: lora.add_adapters(
        params, key, tuple(config.lora.patterns), config.lora.rank, config.lora.alpha
    )


def _optimizer_settings(config: ConfigDict, steps: int) -> OptimizerSettings:
    chosen = config.optimizer
    return OptimizerSettings(
        rates=dict(chosen.rates),
        steps=steps,
        patterns=tuple(map(tuple, chosen.groups)),
        warmup_ratio=chosen.warmup_ratio,
        kind=chosen.kind,
        b1=chosen.b1,
        b2=chosen.b2,
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
        clip_norm=chosen.clip or None,
        mu_dtype=chosen.first_moment_dtype,
    )


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _finite(batch: Batch, metrics: Any, corpus: Corpus) -> tuple[Batch, Any]:
    """The metrics on the host. NotFiniteError names the samples of the step."""
    metrics = jax.device_get(metrics)
    if not metrics["finite"]:
        numbers = batch.samples[batch.samples >= 0].tolist()
        names = [f"{dataset.entry.name} #{local + 1}" for dataset, local in map(corpus.locate, numbers[:8])]
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
