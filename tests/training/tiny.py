"""Tiny models, batches and runs of the training step, shared by the tests of its numerics."""

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
from vl3_jax.training import OptimizerConfig, abstract_state, make_optimizer, make_train_step, new_state
from vl3_jax.training.state import state_shardings

TASKS = 3
MODEL = VideoLLaMA3(preset("tiny"))
RATES = {"vision": 1e-3, "projector": 1e-3, "llm": 1e-3}
# Programs that run for moments are not worth the compiler's time.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def start_params() -> dict:
    return random_params(MODEL.config)


@functools.cache
def short_batch(rows: int = 8) -> dict:
    """Rows of 16 tokens and 16 patches: pictures, text, three tasks, and a row that is half padding."""
    rng = np.random.default_rng(0)

    def row(i: int):
        samples = [random_sample(rng, [random_visual(rng, (1, 4, 4), 2)], text=2 + i % 2, task=i % TASKS)]
        return samples + [random_sample(rng, [], text=5, task=(i + 1) % TASKS)] * (i % 4 > 0)

    samples = [row(i) for i in range(rows)]
    return weighted(pack(samples, shape_for(samples)))


@functools.cache
def split_batch(rows: int = 8) -> dict:
    """The like with two vision rows, so that a mesh can split those as well."""
    rng = np.random.default_rng(1)

    def row(i: int):
        visuals = [random_visual(rng, (2, 4, 4), 2, still=0.4 * (i % 2))]
        return [random_sample(rng, visuals, text=3 + i % 2, task=i % TASKS)]

    samples = [row(i) for i in range(rows)]
    shape = dataclasses.replace(shape_for(samples, vision_rows=2), patches=16, vision_tokens=16)
    return weighted(pack(samples, shape))


@functools.cache
def long_batch(rows: int = 8) -> dict:
    """Rows with a pruned video and a picture over two vision rows, longer than a block of dense attention."""
    rng = np.random.default_rng(1)

    def row(i: int):
        video, picture = random_visual(rng, (2, 4, 4), 2, still=0.4), random_visual(rng, (1, 4, 6), 1)
        return [
            random_sample(rng, [video], text=5, task=i % TASKS),
            random_sample(rng, [picture], text=3, task=(i + 1) % TASKS),
        ]

    samples = [row(i) for i in range(rows)]
    return weighted(pack(samples, shape_for(samples, vision_rows=2)))


def weighted(batch: dict) -> dict:
    """The batch with loss weights other than 0 and 1."""
    scale = np.random.default_rng(2).choice([0.0, 0.5, 1.0, 2.0], batch["loss_weight"].shape)
    return batch | {"loss_weight": (batch["loss_weight"] * scale).astype(np.float32)}


def optimizer_for(params=None, **settings):
    settings = {"learning_rates": RATES, "steps": 20, **settings}
    return make_optimizer(OptimizerConfig(**settings), start_params() if params is None else params)


def quick(function, *arguments, **options):
    """The function's value, compiled as fast as can be."""
    return jax.jit(function, compiler_options=QUICK, **options)(*arguments)


_logits = jax.jit(forward.__wrapped__, static_argnums=0, compiler_options=QUICK)


def logits(params: dict, batch: dict) -> np.ndarray:
    """[B, L, vocab] of the tiny model."""
    return np.asarray(_logits(MODEL, params, batch))


_compiled = {}


class Run:
    """A state, and the step that changes it; steps of one kind are compiled once."""

    def __init__(self, optimizer, batch, params=None, mesh=None, model=MODEL, **options):
        params = start_params() if params is None else params
        self.shardings = None
        if mesh is not None:
            self.shardings = state_shardings(abstract_state(optimizer, params), model.config, mesh)
            batch = jax.device_put(batch, batch_shardings(batch, mesh))
        start = quick(functools.partial(new_state, optimizer), params, out_shardings=self.shardings)
        self.batch, self.state, self.metrics = batch, start, []
        key = (repr(optimizer.settings), model, mesh, str(jax.eval_shape(lambda: (params, batch))), str(options))
        if key not in _compiled:
            step = make_train_step(model, optimizer, tasks=TASKS, shardings=self.shardings, **options)
            _compiled[key] = step.lower(self.state, batch).compile(compiler_options=QUICK)
        self.compiled = _compiled[key]

    def steps(self, count: int, batch=None) -> list[float]:
        """Losses of `count` more steps."""
        for _ in range(count):
            self.state, metrics = self.compiled(self.state, self.batch if batch is None else batch)
            self.metrics.append(jax.device_get(metrics))
        return [float(metrics["loss"]) for metrics in self.metrics[-count:]]


def distance(ours, reference) -> float:
    """Norm of the difference over the norm of the reference, all leaves together."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True))
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in wide) / sum(np.sum(b**2) for _, b in wide)))
