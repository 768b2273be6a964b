"""Prefill and decode tokens per second beside transformers, on the same weights, in one run.

    PYTHONPATH=tests python benchmarks/generation.py [--prompt 1024] [--new 128] [--repeats 5]

Mid-size random weights (tower 12 x 384, decoder 8 x 512), float32, one picture in the prompt. Both sides answer
greedily from the same packed sample; the two are timed in turn and the medians compared.
"""

import argparse
import statistics
import time

import numpy as np

from support.reference import model_inputs, reference_model, tensors, torch
from support.samples import random_sample, random_visual
from support.weights import native_params
from vl3_jax.inference.engine import Engine, Timings
from vl3_jax.inference.sampling import Sampling
from vl3_jax.model import VideoLLaMA3, preset


def ours(engine: Engine, sample, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill (tower included, first token) and of the other tokens."""
    timings = Timings()
    list(engine.generate([sample], Sampling(new_tokens), timings))
    return timings.prefill, timings.decode


def theirs(reference, inputs: dict, new_tokens: int) -> tuple[float, float]:
    """The same for transformers: a run of one token is its prefill."""
    seconds = []
    for count in (1, new_tokens):
        started = time.perf_counter()
        reference.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1] - seconds[0]


def main() -> None:
    """Prints both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1024, help="tokens, half of them vision tokens")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    config = preset("mid")
    reference = reference_model(config)
    engine = Engine(VideoLLaMA3(config), native_params(tensors(reference), config), stop_ids=())
    rng = np.random.default_rng(0)
    side = int((arguments.prompt / 2) ** 0.5) // 2 * 2
    picture = random_visual(rng, (1, side, side), 1)
    sample = random_sample(rng, [picture], text=(arguments.prompt - picture.num_tokens) // 2)
    inputs = model_inputs([sample])

    ours(engine, sample, arguments.new), theirs(reference, inputs, arguments.new)
    pairs = [
        (ours(engine, sample, arguments.new), theirs(reference, inputs, arguments.new))
        for _ in range(arguments.repeats)
    ]
    print(f"{len(sample.tokens)} prompt tokens ({picture.num_tokens} patches), {arguments.new} new, ", end="")
    print(f"{torch.get_num_threads()} threads, median of {arguments.repeats}")
    print(f"{'':10}{'vl3_jax tok/s':>16}{'transformers tok/s':>20}{'ratio':>8}")
    for phase, name, tokens in ((0, "prefill", len(sample.tokens)), (1, "decode", arguments.new - 1)):
        a, b = (statistics.median(pair[side][phase] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(pair[1][phase] / pair[0][phase] for pair in pairs)
        print(f"{name:10}{tokens / a:16.0f}{tokens / b:20.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
