"""The part `step`: a training step of the 2B over one row that is as full as those of stage 4.

The state and the step are those that `training/setup.py` builds, without the modules of the data that it imports.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vl3_jax.bench.gpu.cases import Case, Conditions
from vl3_jax.bench.inputs import NUM_TEXT_IDS
from vl3_jax.model import ModelConfig, VideoLLaMA3, abstract_params, init_params, preset
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.processing.packed_batch import PATCH_DIM, BatchShape, Sample, Visual, pack
from vl3_jax.training.flops import count_work, peak_flops, step_flops
from vl3_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from vl3_jax.training.state import TrainState, new_state, state_shardings
from vl3_jax.training.step import make_train_step

RATES = {"vision": 2e-6, "projector": 1e-5, "llm": 1e-5}  # of stage 4
_STEPS = 1000  # steps of the learning-rate schedule, whose number does not matter
# A row of stage 4 (docs/benchmarks.md). The pruner leaves so many vision tokens that questions and answers fit.
PATCH_FILL, SAMPLES_PER_ROW, MERGE, VISION_SHARE, SUPERVISED = 0.967, 2.35, 2, 0.8, 0.15
_REMAT = ("dots", "outputs")


class Sizes(NamedTuple):
    """Sizes of the step.

    Attributes:
      model: Preset of the model.
      fills: For each length of a row in tokens, how full of tokens it is, 0 to 1; the content is the same in each.
      patches: Patches of a row.
      side: Patches along a side of a frame.
    """

    model: str
    fills: dict[int, float]
    patches: int
    side: int


_SMALL = Sizes("tiny", {128: 0.69}, 256, 4)
_FULL = Sizes("2b", {16_384: 0.68, 11_264: 0.989}, 40_960, 20)


class StepJob(NamedTuple):
    """What the cases share.

    Attributes:
      config: Sizes of the model.
      mesh: Mesh of one device.
      optimizer: Optimizer of all parameters.
      shardings: Shardings of the state.
      init: Compiled function that makes the state at step 0 from a random key.
    """

    config: ModelConfig
    mesh: Mesh
    optimizer: Optimizer
    shardings: TrainState
    init: Callable[[jax.Array], TrainState]


def cases(conditions: Conditions) -> Iterator[Case]:
    """Lists rows of both lengths with two rematerialisation policies each."""
    sizes = _SMALL if conditions.small else _FULL
    job = make_job(sizes.model)
    for (length, fill), remat in itertools.product(sizes.fills.items(), _REMAT):
        shape = BatchShape(length, sizes.patches, min(length, sizes.patches // MERGE**2))
        samples = stage4_samples(int(length * fill), int(sizes.patches * PATCH_FILL), sizes.side)
        fields = {"tokens": length, "patches": sizes.patches, "remat": remat}
        yield Case(fields, functools.partial(_measure, conditions, job, pack([samples], shape), remat))


def make_job(model: str) -> StepJob:
    """Prepares training of all parameters of a preset on one device.

    Float32 weights and second moments and bfloat16 first moments take 10 bytes a parameter, gradients another 4.
    """
    config, mesh = preset(model), make_mesh({}, jax.devices()[:1])
    optimizer_config = OptimizerConfig(RATES, first_moment_dtype="bfloat16")
    optimizer = make_optimizer(optimizer_config, abstract_params(config), _STEPS)

    def init(key: jax.Array) -> TrainState:
        return new_state(optimizer, init_params(VideoLLaMA3(config), key), "float32", "float32")

    shardings = state_shardings(jax.eval_shape(init, jax.random.key(0)), config, mesh)
    return StepJob(config, mesh, optimizer, shardings, jax.jit(init, out_shardings=shardings))


def stage4_samples(tokens: int, patches: int, side: int) -> list[Sample]:
    """Generates videos with supervised answers, which fill a row together.

    Args:
      tokens: Tokens of all samples together.
      patches: Patches that they have at most.
      side: Patches along a side of their square frames.
    """
    rng = np.random.default_rng(0)
    shares = np.append(np.ones(int(SAMPLES_PER_ROW)), SAMPLES_PER_ROW % 1) / SAMPLES_PER_ROW
    frames = patches // side**2
    ends = [np.round(np.cumsum(shares) * total).astype(int) for total in (tokens, frames)]
    lengths, counts = (np.diff(end, prepend=0) for end in ends)
    return [_video_sample(rng, int(length), int(count), side) for length, count in zip(lengths, counts, strict=True)]


def _video_sample(rng: np.random.Generator, length: int, frames: int, side: int) -> Sample:
    """Generates a sample of `length` tokens: what is left of a pruned video of noise, a question, an answer."""
    num_patches = frames * side**2
    num_vision = num_patches // MERGE**2
    kept = min(num_vision, int(VISION_SHARE * length))
    keep = np.zeros(num_vision, bool)
    keep[np.linspace(0, num_vision - 1, kept).astype(int)] = True
    pixels = rng.integers(0, 256, (num_patches, PATCH_DIM), np.uint8)
    index, ids = np.arange(length), rng.integers(1, NUM_TEXT_IDS, length)
    loss_weight = (index >= length - round(SUPERVISED * length)).astype(np.float32)
    return Sample(ids, index < kept, [Visual(pixels, (frames, side, side), MERGE, keep)], loss_weight)


def _measure(conditions: Conditions, job: StepJob, batch: dict, remat: str, figures: dict[str, Any]) -> None:
    """Compiles the step and runs it several times."""
    model = VideoLLaMA3(job.config, jnp.bfloat16, jnp.float32, remat, remat)
    step = make_train_step(model, job.optimizer, shardings=job.shardings)
    work, device = count_work(batch), job.mesh.devices.flat[0]
    flops = step_flops(job.config, work)["total"]
    with jax.set_mesh(job.mesh):
        arrays = jax.device_put(batch, batch_shardings(batch, job.mesh))
        state = job.init(jax.random.key(0))
        start = time.perf_counter()
        program = step.lower(state, arrays).compile(conditions.compiler_options(device.platform))
        figures["compile_seconds"] = time.perf_counter() - start
        figures["program_bytes"] = _program_bytes(program.memory_analysis())
        seconds = []
        for _ in range(1 + conditions.rounds):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(program(state, arrays))
            seconds.append(time.perf_counter() - start)
    if not metrics["finite"]:
        raise FloatingPointError("the loss or its gradient is not finite")
    figures["seconds"] = statistics.median(seconds[1:])
    figures["tokens_per_second"] = work.tokens / figures["seconds"]
    figures["flops"] = flops
    peaks = {"mfu": peak_flops(device.device_kind), "mfu_of_matrix_product": conditions.flops_per_second}
    figures |= {name: flops / figures["seconds"] / peak for name, peak in peaks.items() if peak}
    allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if allocated:
        figures["allocated_bytes"] = allocated  # the peak of all cases so far


def _program_bytes(memory: Any) -> int:
    """Returns the device memory that a program takes with its arguments, from the compiler's analysis."""
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return sum(sizes) - memory.alias_size_in_bytes
