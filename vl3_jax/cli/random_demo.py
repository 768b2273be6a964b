"""What `vl3 demo` shows while the package has no trained weights: a whole run of a tiny random model, which says so."""

import argparse
import time

import numpy as np

from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual

FRAMES, GRID = 8, 12  # a clip of 8 frames, 12 x 12 patches each
QUESTION = np.arange(20, 40)  # stands for a tokenised question: the tiny model has no tokenizer


def run(arguments: argparse.Namespace) -> None:
    """Prunes, encodes and answers about a drawn clip, and prints what each step did."""
    import jax

    from vl3_jax.inference.engine import Engine, Timings
    from vl3_jax.inference.sampling import Sampling
    from vl3_jax.model import VideoLLaMA3, init_params, preset

    config = preset("tiny")
    model = VideoLLaMA3(config)
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(arguments.seed))
    engine = Engine(model, params, stop_ids=())
    clip = moving_square(arguments.seed)
    sample = Sample(
        tokens=np.concatenate([np.zeros(clip.num_tokens, int), QUESTION]),
        is_vision=np.arange(clip.num_tokens + len(QUESTION)) < clip.num_tokens,
        visuals=[clip],
    )
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens, seed=arguments.seed)

    started, timings = time.perf_counter(), Timings()
    answer = np.concatenate([step.tokens[0] for step in engine.generate([sample], sampling, timings)])
    seconds = time.perf_counter() - started

    print(f"device    {jax.devices()[0].device_kind}, {config.num_parameters:,} random parameters")
    print(f"clip      {FRAMES} frames, {len(clip.patches)} patches, {len(clip.keep)} vision tokens")
    print(f"pruned    {len(clip.keep) - clip.num_tokens} tokens that do not differ from the frame before")
    print(f"prompt    {len(sample.tokens)} tokens; {len(answer)} generated: {' '.join(map(str, answer))}")
    print(f"seconds   {seconds:.1f} in all: compile {timings.compile:.1f}, prefill {timings.prefill:.3f}, ", end="")
    print(f"decode {timings.decode:.3f} ({(len(answer) - 1) / max(timings.decode, 1e-9):.0f} tokens/s)")
    print("The weights are random: the run is real, the answer is noise. Load a checkpoint for answers.")


def moving_square(seed: int) -> Visual:
    """A bright square crossing a still background of noise, cut into patches and pruned."""
    rng = np.random.default_rng(seed)
    size = GRID * 14
    frames = np.repeat(rng.integers(0, 64, (1, size, size, 3), np.uint8), FRAMES, axis=0)
    for index, frame in enumerate(frames):
        left = index * (size - 28) // (FRAMES - 1)
        frame[70:98, left : left + 28] = 255
    blocks = frames.reshape(FRAMES, GRID // 2, 2, 14, GRID // 2, 2, 14, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    keep = keep_mask(blocks.reshape(FRAMES, -1, 4 * PATCH_DIM).astype(np.float32) / 127.5 - 1)
    return Visual(np.ascontiguousarray(blocks).reshape(-1, PATCH_DIM), (FRAMES, GRID, GRID), 2, keep.reshape(-1))
