"""Stage 1 of nano: the tower learns to see.

Names, colours and captions of single pictures, and the language of stage 0.

    vl3 train --config configs/nano_stage1.py --workdir RUNS/nano1 --config.init_from=RUNS/nano0
"""

from data_pipelines.synthetic.mixture import stage_mixture
from vl3_jax.training.run_config import training_config


def get_config():
    """The tower learns fast from nothing; the decoder slowly, so as to keep its language."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(1, samples=240_000),
        learning_rates={"vision": 1e-2, "projector": 1e-2, "llm": 1.5e-3},
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=1200,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
    )
