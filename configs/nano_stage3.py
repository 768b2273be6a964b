"""Stage 3 of nano: two things, two pictures, first videos.

Which belongs to which; names, motion, order and times in short clips.

    vl3 train --config configs/nano_stage3.py --workdir RUNS/nano3 --config.init_from=RUNS/nano2
"""

from data_pipelines.synthetic.mixture import stage_mixture
from vl3_jax.training.run_config import training_config


def get_config():
    """Everything learns; the decoder slowly, so as to keep its language."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(3, samples=260_000),
        learning_rates={"vision": 4e-3, "projector": 4e-3, "llm": 2e-3},
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=1400,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
    )
