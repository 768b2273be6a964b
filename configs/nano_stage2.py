"""Stage 2 of nano: where and how many.

Reading digits, boxes, counting, places; and what stage 1 knows.

    vl3 train --config configs/nano_stage2.py --workdir RUNS/nano2 --config.init_from=RUNS/nano1
"""

from data_pipelines.synthetic.mixture import stage_mixture
from vl3_jax.training.run_config import training_config


def get_config():
    """Everything learns; the decoder slowly, so as to keep its language."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(2, samples=330_000),
        learning_rates={"vision": 5e-3, "projector": 5e-3, "llm": 2e-3},
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=1700,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
    )
