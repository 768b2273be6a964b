"""Stage 0 of nano: language alone, for this tiny model has no pretrained decoder to begin from.

The words, numbers and formats of all later answers, without pictures.

    vl3 train --config configs/nano_stage0.py --workdir RUNS/nano0
"""

from data_pipelines.synthetic.mixture import stage_mixture
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.training.run_config import training_config


def get_config():
    """Only the decoder learns; rows have no room for pictures."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(0, samples=100_000),
        learning_rates={"vision": 0.0, "projector": 0.0, "llm": 5e-3},
        random_init=True,
        tokenizer=str(TOKENIZER),
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=500,
        dtype="float32",
        frozen_dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
        data__patches=16,
        data__vision_tokens=16,
    )
