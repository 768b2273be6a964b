"""Forward and backward of the whole model over a packed row of questions about pictures, and its utilisation.

On an accelerator that is the 2B and 16,384 tokens; both sides recompute activations there.
"""

import functools

import jax
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.inputs import Weights, question, weights
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.processing.packed_batch import BatchShape, Sample, pack
from vl3_jax.training.flops import count_work, step_flops
from vl3_jax.training.step import batch_loss

ALONE = "separate rows"
_SAMPLES = 16
_VISION = 2  # half of the tokens


def measure(settings: Settings) -> Table:
    """Loss and gradients of all weights."""
    both = weights(settings)
    tokens = settings.pick(32, 128, 1024)
    rng = np.random.default_rng(0)
    samples = [question(rng, tokens, tokens // _VISION) for _ in range(_SAMPLES)]
    packed, alone = packed_rows([samples]), packed_rows([[sample] for sample in samples])
    remat = "outputs" if settings.accelerator else "none"
    model = both.model.clone(vision_remat=remat, text_remat=remat)
    run = jax.value_and_grad(functools.partial(mean_loss, model))
    sides = {OURS: settings.compiled(run, both.params, packed), ALONE: settings.compiled(run, both.params, alone)}
    if both.reference is not None:
        sides[reference.SIDE] = _theirs(both, samples, recompute=settings.accelerator)
    seconds = in_turns(sides, settings.rounds)
    flops = step_flops(settings.config, count_work(packed))["total"]
    case = f"{_SAMPLES} x {tokens:,} tokens, half of them seen"
    length = _SAMPLES * tokens
    rows = [Row(case, side, time, length, "tokens", flops) for side, time in seconds.items()]
    notes = () if settings.accelerator else ("in miniature: there is no accelerator here",)
    return Table("step", f"{settings.model}, {settings.dtype}, forward and backward", rows, notes + both.notes)


def packed_rows(rows: list[list[Sample]]) -> dict[str, np.ndarray]:
    """A batch without room to spare."""
    tokens = sum(len(sample.tokens) for sample in rows[0])
    vision = sum(sample.num_vision_tokens for sample in rows[0])
    return pack(rows, BatchShape(tokens, vision, vision, samples=len(rows[0])))


def mean_loss(model, params: dict, batch: dict) -> jax.Array:
    """Of a packed batch."""
    sums = batch_loss(model, params, batch)
    return sums.loss / sums.weight


def reference_batch(model, samples: list[Sample]) -> dict:
    """The same for transformers' model, with its labels; pictures are not learned."""
    inputs = reference.model_inputs(samples)
    ids = inputs["input_ids"]
    inputs["labels"] = ids.masked_fill(ids == reference.IMAGE_ID, -100)
    return {name: value.to(model.device) for name, value in inputs.items()}


def _theirs(both: Weights, samples: list[Sample], recompute: bool):
    model = both.reference
    inputs = reference_batch(model, samples)

    def run() -> None:
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        model.eval()
        reference.synchronise(model)

    return run
