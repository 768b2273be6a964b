"""Stage 2 of nano: where and how many.

Reading digits, boxes, counting, places; and what stage 1 knows.

    vl3 train --config configs/nano_stage2.py --workdir RUNS/nano2 --config.start=RUNS/nano1
"""

from data_pipelines.synthetic.mixture import stage_mixture
from vl3_jax.training.config import training_config


def get_config():
    """Everything learns: there is no pretrained part to keep."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(2, samples=330_000),
        rates={"vision": 6e-3, "projector": 6e-3, "llm": 4e-3},
        optimizer__kind="muon",
        batch__rows=8,
        steps=2000,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
    )
