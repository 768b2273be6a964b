"""A training run from top to bottom: mesh, data, model, state, loop."""

import collections
import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vl3_jax.model import VideoLLaMA3
from vl3_jax.parallel import processes
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.storage import paths
from vl3_jax.storage.disk_space import translate_full_disk
from vl3_jax.training import data, preflight, setup
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.init import prepare_workdir, recorded_rows, resolve_init
from vl3_jax.training.metrics import Evaluator, MetricAccumulator, MetricWriter
from vl3_jax.training.orbax_use import raised_errors_only
from vl3_jax.training.run_config import ProfileConfig, RunConfig

PROFILE = "profile"

logger = logging.getLogger(__name__)


# Returns the scores of a model by name, from its structure, parameters, mesh, folder of files and processor settings.
AskBenchmarks = Callable[[VideoLLaMA3, Any, Mesh, str, ProcessorConfig], dict[str, float]]


def train(config: RunConfig, workdir: str | os.PathLike, ask_benchmarks: AskBenchmarks | None = None) -> int:
    """Trains, or resumes the run in `workdir`, until its last step or a signal.

    Args:
      config: Configuration of the run.
      workdir: Folder or gs:// URL; new, or of the same run.
      ask_benchmarks: Asks the benchmarks of `config.eval`; None for none.

    Returns:
      The number of steps done.

    Raises:
      InputError: Configuration, data or workdir do not fit; one line.
      NotFiniteError: Loss or gradient became infinite or undefined.
      TooManyBadSamplesError, DataWorkerError: Raised by the data.
    """
    folder = paths.resolve(workdir)
    # The last two see an error first, before anything waits for processes that may be gone.
    with (
        raised_errors_only(),
        contextlib.ExitStack() as stack,
        processes.ended_together(),
        translate_full_disk(folder),
    ):
        return _train(config, folder, stack, ask_benchmarks)


def _train(
    config: RunConfig, folder: epath.Path, stack: contextlib.ExitStack, ask_benchmarks: AskBenchmarks | None
) -> int:
    """Does what `train` says; what is to be closed at the end goes to `stack`."""
    # ------------------------------------------------------------------------------------------------ mesh and data
    preflight.check(config, folder)
    lock = preflight.lock_workdir(folder, stack)
    recorded = recorded_rows(folder, config)
    mesh = make_mesh(vars(config.mesh))
    init = resolve_init(config)
    tokenizer = stack.enter_context(init.local_files())
    mixture = data.open_data(config.data, tokenizer)
    loaded = data.load_plans(mixture, folder)
    rows = data.rows_per_step(config, mixture, mesh, recorded)
    total, epochs = data.total_steps(config, mixture, rows)
    config.profile.check_within(total)

    # ------------------------------------------------------------------------------------------------------ model
    samples = data.samples_per_step(config, mixture, rows)
    scaled = dataclasses.replace(config, optimizer=config.optimizer.for_batch(samples / config.batch.samples))
    run = setup.build_train_setup(scaled, init.model_config, mesh, rows, total, len(mixture.tasks))

    # ------------------------------------------------------------------------------------------------------ state
    prepare_workdir(folder, config, init, rows)
    data.save_plans(mixture, folder, loaded)
    has_adapters = config.lora.rank > 0
    checkpoints = Checkpoints(folder, run.optimizer, config.checkpoint, has_adapters)
    stack.callback(checkpoints.close)
    done = checkpoints.latest()
    is_first = jax.process_index() == 0
    log = logger.info if is_first else logger.debug
    if done >= total:
        log(f"{folder}: all {total} steps are done")
        return done
    log(setup.overview(run, mixture, config, rows, samples, total))
    if is_first and (note := setup.short_run_note(config, total)):
        logger.warning("warning: %s", note)
    stack.enter_context(jax.set_mesh(mesh))
    state = data_state = None
    if not done or has_adapters:
        state = run.first_state(lambda shardings: init.params(shardings, config.seed))
    if done:
        resumed = checkpoints.restore(run.abstract_state, state)
        done, state, data_state = resumed.step, resumed.state, resumed.data_state
    checkpoints.check_space(run.abstract_state, config.checkpoint.keep + 1)
    writer = MetricWriter(folder, total, done, is_first, config.log.tensorboard)
    stack.callback(writer.close)

    # ------------------------------------------------------------------------------------------------------- loop
    loader = stack.enter_context(data.build_loader(config, mixture, mesh, rows, epochs, data_state))
    steps = {n: run.compile_step(rows, mixture.settings.row_shape(n)) for n in loader.step_plan.lengths}
    processor_config = mixture.settings.processor
    ask = ask_benchmarks and (lambda params: ask_benchmarks(run.model, params, mesh, tokenizer, processor_config))
    evaluator = Evaluator(config, run, mixture, rows, ask)
    metrics = MetricAccumulator(config, init.model_config, mixture, mesh)
    batches = data.prefetch_to_device(metrics.observe(loader), mesh, rows)
    preemption = stack.enter_context(PreemptionHandler())
    pending_metrics: collections.deque[tuple[Any, Any]] = collections.deque()
    step = done
    while step < total:
        batch = metrics.next_batch(batches)
        with _profiled(config.profile, folder, step, done):
            state, step_metrics = steps[batch.arrays["tokens"].shape[1]](state, batch.arrays)
        step += 1
        pending_metrics.append((batch, step_metrics))
        stopping = preemption.should_stop(step)
        last = step == total or stopping
        reporting, saving = last or step % config.log.every == 0, last or checkpoints.is_due(step)
        # One step behind, so that the devices never wait for the host; up to date before metrics or state are kept.
        while len(pending_metrics) > (0 if reporting or saving else 1):
            metrics.add(*pending_metrics.popleft())
        writer.step(step)
        if reporting or saving:
            lock.check()
        if reporting:
            writer.write(step, metrics.summary(loader.log))
        if saving:
            checkpoints.save(step, state, batch.state)
        if evaluator.is_due(step, total):
            writer.write(step, evaluator.measure(state.params))
            metrics.reset()
        if stopping and step < total:
            log(f"stopped after step {step} of {total}; run the same command to resume")
            break
    checkpoints.wait()
    return step


@contextlib.contextmanager
def _profiled(config: ProfileConfig, workdir: epath.Path, step: int, first: int):
    """Traces some steps, for TensorBoard or Perfetto; `first` is the first step since this start of the run."""
    if config.steps and step == max(config.start, first) < config.start + config.steps:
        jax.profiler.start_trace(str(workdir / PROFILE))
    yield
    if config.steps and step == config.start + config.steps - 1:
        jax.effects_barrier()
        jax.profiler.stop_trace()


class PreemptionHandler:
    """Remembers SIGTERM, SIGHUP and SIGINT while it is open, instead of being killed by them; a second SIGINT kills.

    With several processes a signal to any of them is enough: JAX's preemption service agrees on a step.
    """

    def __init__(self):
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to the preemption service.
            handled = [signal.SIGINT, signal.SIGHUP, *([signal.SIGTERM] if jax.process_count() == 1 else [])]
            heeded = [number for number in handled if signal.getsignal(number) is not signal.SIG_IGN]  # as by nohup
            self._previous = {number: signal.signal(number, self._remember) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Returns whether to stop after this step; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def _remember(self, number: int, _: object) -> None:
        if self._signal == signal.SIGINT == number:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self._signal = number
        if jax.process_count() > 1 and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
