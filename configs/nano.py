"""The five stages of nano, the tiny model of this package.

    vl3 train --config nano:0 --workdir RUNS/nano0
    vl3 train --config nano:1 --workdir RUNS/nano1 --config.init_from=RUNS/nano0

Stage 0 is language alone, for this model has no pretrained decoder: the words, numbers and formats of all later
answers. Stage 1 adds names, colours and captions of single images; stage 2 reading digits, boxes, counting, positions;
stage 3 pairs, and names, motion, order and times in short videos; stage 4 nearly still videos and live streams. Each
repeats what was taught before.
"""

from data_pipelines.synthetic.mixture import stage_mixture
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.training.run_config import split_variant, train_config

# Samples of an epoch, optimizer steps, learning rates. The tower learns fast from nothing, the decoder slowly
# afterwards, so that it keeps its language.
STAGES = {
    "0": (100_000, 500, {"vision": 0.0, "projector": 0.0, "llm": 5e-3}),
    "1": (240_000, 1200, {"vision": 1e-2, "projector": 1e-2, "llm": 1.5e-3}),
    "2": (330_000, 1700, {"vision": 5e-3, "projector": 5e-3, "llm": 2e-3}),
    "3": (260_000, 1400, {"vision": 4e-3, "projector": 4e-3, "llm": 2e-3}),
    "4": (260_000, 2000, {"vision": 4e-3, "projector": 4e-3, "llm": 2e-3}),
}
# Rows of stage 0 hold no images.
TEXT_ONLY = {
    "random_init": True,
    "tokenizer": str(TOKENIZER),
    "frozen_dtype": "float32",
    "data__patches": 16,
    "data__vision_tokens": 16,
}


def get_config(variant: str = "0"):
    """Rows of 1,024 tokens and 1,152 patches, on two devices that a CPU is split into."""
    stage, is_mock = split_variant(variant, tuple(STAGES))
    samples, steps, learning_rates = STAGES[stage]
    return train_config(
        "mock" if is_mock else "",
        models=("nano",),
        data=stage_mixture(int(stage), samples),
        learning_rates=learning_rates,
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=steps,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
        **(TEXT_ONLY if stage == "0" else {}),
    )
