"""Tiny models, batches and runs of the train step, shared by the tests of its numerics."""

import dataclasses
import functools

import jax
import numpy as np

from support.forward import forward
from support.samples import random_sample, random_visual, shape_for
from support.weights import random_params
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.processing.packed_batch import pack
from vl3_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from vl3_jax.training.state import new_state, state_shardings
from vl3_jax.training.step import make_train_step

TASKS = 3
MODEL = VideoLLaMA3(preset("tiny"))
LEARNING_RATES = {"vision": 1e-3, "projector": 1e-3, "llm": 1e-3}
# Compilation without XLA optimisation: the programs of these tests run for a moment only.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@functools.cache
def start_params() -> dict:
    return random_params(MODEL.config)


@functools.cache
def short_batch(rows: int = 8) -> dict:
    """Returns rows of 16 tokens and 16 patches: images, text, three tasks, and a row that is half padding."""
    rng = np.random.default_rng(0)

    def row(i: int):
        samples = [random_sample(rng, [random_visual(rng, (1, 4, 4), 2)], text=2 + i % 2, task=i % TASKS)]
        return samples + [random_sample(rng, [], text=5, task=(i + 1) % TASKS)] * (i % 4 > 0)

    samples = [row(i) for i in range(rows)]
    return with_random_weights(pack(samples, shape_for(samples)))


@functools.cache
def split_batch(rows: int = 8) -> dict:
    """Returns rows like those of `short_batch` with two vision rows each, which a mesh can split too."""
    rng = np.random.default_rng(1)

    def row(i: int):
        visuals = [random_visual(rng, (2, 4, 4), 2, still=0.4 * (i % 2))]
        return [random_sample(rng, visuals, text=3 + i % 2, task=i % TASKS)]

    samples = [row(i) for i in range(rows)]
    shape = dataclasses.replace(shape_for(samples, vision_rows=2), patches=16, vision_tokens=16)
    return with_random_weights(pack(samples, shape))


@functools.cache
def long_batch(rows: int = 8) -> dict:
    """Returns rows with a pruned video and an image over two vision rows, longer than a block of dense attention."""
    rng = np.random.default_rng(1)

    def row(i: int):
        video, image = random_visual(rng, (2, 4, 4), 2, still=0.4), random_visual(rng, (1, 4, 6), 1)
        return [
            random_sample(rng, [video], text=5, task=i % TASKS),
            random_sample(rng, [image], text=3, task=(i + 1) % TASKS),
        ]

    samples = [row(i) for i in range(rows)]
    return with_random_weights(pack(samples, shape_for(samples, vision_rows=2)))


def with_random_weights(batch: dict) -> dict:
    """Returns the batch with loss weights other than 0 and 1."""
    scale = np.random.default_rng(2).choice([0.0, 0.5, 1.0, 2.0], batch["loss_weight"].shape)
    return batch | {"loss_weight": (batch["loss_weight"] * scale).astype(np.float32)}


def optimizer_for(params=None, steps: int = 20, **settings) -> Optimizer:
    """Builds an optimizer of the tiny model's parameters, or of `params`, from settings of `OptimizerConfig`."""
    config = OptimizerConfig(**{"learning_rates": LEARNING_RATES, **settings})
    return make_optimizer(config, start_params() if params is None else params, steps)


def run_jitted(function, *arguments, **options):
    """Compiles a function without XLA optimisation and calls it."""
    return jax.jit(function, compiler_options=FAST_COMPILE, **options)(*arguments)


_logits = jax.jit(forward.__wrapped__, static_argnums=0, compiler_options=FAST_COMPILE)


def logits(params: dict, batch: dict) -> np.ndarray:
    """Returns the logits [B, L, vocab] of the tiny model."""
    return np.asarray(_logits(MODEL, params, batch))


_compiled = {}


class Run:
    """A train state and the step that updates it; equal steps are compiled once."""

    def __init__(self, optimizer, batch, params=None, mesh=None, model=MODEL, **options):
        params = start_params() if params is None else params
        init, self.shardings = functools.partial(new_state, optimizer), None
        if mesh is not None:
            self.shardings = state_shardings(jax.eval_shape(init, params), model.config, mesh)
            batch = jax.device_put(batch, batch_shardings(batch, mesh))
        self.state = run_jitted(init, params, out_shardings=self.shardings)
        self.batch, self.metrics = batch, []
        schedule = np.asarray(optimizer.schedule(np.arange(100))).tobytes()
        shapes = str(jax.eval_shape(lambda: (params, batch)))
        key = (repr(optimizer.config), schedule, model, mesh, shapes, str(options))
        if key not in _compiled:
            step = make_train_step(model, optimizer, tasks=TASKS, shardings=self.shardings, **options)
            _compiled[key] = step.lower(self.state, batch).compile(compiler_options=FAST_COMPILE)
        self.compiled = _compiled[key]

    def steps(self, count: int, batch=None) -> list[float]:
        """Runs `count` more steps and returns their losses."""
        for _ in range(count):
            self.state, metrics = self.compiled(self.state, self.batch if batch is None else batch)
            self.metrics.append(jax.device_get(metrics))
        return [float(metrics["loss"]) for metrics in self.metrics[-count:]]


def distance(ours, reference) -> float:
    """Returns the norm of the difference of two trees relative to the norm of the reference."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in arrays) / sum(np.sum(b**2) for _, b in arrays)))
