"""Forward and backward of the whole model over a packed row of questions about images.

On an accelerator the default is the 2B with 16,384 tokens, and both sides recompute activations. On a CPU ours keeps
the results of its products: writing more to memory takes longer than computing the rest again.
"""

import functools

import jax
import numpy as np

from vl3_jax.bench.inputs import model_pair, random_sample
from vl3_jax.bench.settings import REDUCED_SIZES, Settings
from vl3_jax.bench.table import OURS, REFERENCE, SEPARATE_ROWS, Table
from vl3_jax.bench.timing import measure_case
from vl3_jax.processing.packed_batch import BatchShape, Sample, pack
from vl3_jax.training.flops import count_work, step_flops
from vl3_jax.training.step import batch_loss

_SAMPLES = 16


def measure(settings: Settings) -> Table:
    """Measures the loss and the gradients of all weights."""
    pair = model_pair(settings)
    tokens = settings.pick(32, 128, 1024)
    rng = np.random.default_rng(0)
    samples = [random_sample(rng, tokens, tokens // 2) for _ in range(_SAMPLES)]
    packed, separate = packed_rows([samples]), packed_rows([[sample] for sample in samples])
    remat = "outputs" if settings.accelerator else "dots"
    model = pair.model.clone(vision_remat=remat, text_remat=remat)
    run = jax.value_and_grad(functools.partial(mean_loss, model))
    sides = {
        OURS: settings.compiled(run, pair.params, packed),
        SEPARATE_ROWS: settings.compiled(run, pair.params, separate),
    }
    if pair.reference is not None:
        sides[REFERENCE] = pair.reference.step(samples, recompute=settings.accelerator)
    flops = step_flops(settings.config, count_work(packed))["total"]
    case = f"{_SAMPLES} x {tokens:,} tokens, half vision tokens"
    rows = measure_case(case, sides, settings.rounds, _SAMPLES * tokens, "tokens", flops)
    notes = () if settings.accelerator else (REDUCED_SIZES,)
    return Table("step", f"{settings.model}, {settings.dtype}, forward and backward", rows, notes + pair.notes)


def packed_rows(rows: list[list[Sample]]) -> dict[str, np.ndarray]:
    """Packs rows of equal size into a batch without padding."""
    tokens = sum(len(sample.tokens) for sample in rows[0])
    vision = sum(sample.num_vision_tokens for sample in rows[0])
    return pack(rows, BatchShape(tokens, vision, vision, samples=len(rows[0])))


def mean_loss(model, params: dict, batch: dict) -> jax.Array:
    """Returns the weighted mean loss of a packed batch."""
    sums = batch_loss(model, params, batch)
    return sums.loss / sums.weight
