"""Stage 4 of nano: video above all.

Times, order, nearly still clips and live streams, beside everything learned before.

    vl3 train --config configs/nano_stage4.py --workdir RUNS/nano4 --config.init_from=RUNS/nano3
"""

from data_pipelines.synthetic.mixture import stage_mixture
from vl3_jax.training.run_config import training_config


def get_config():
    """Everything learns; the decoder slowly, so as to keep its language."""
    return training_config(
        "",
        model="nano",
        data=stage_mixture(4, samples=260_000),
        learning_rates={"vision": 4e-3, "projector": 4e-3, "llm": 2e-3},
        optimizer__kind="muon",
        batch__rows=8,
        batch__grad_accum_steps=1,
        steps=2000,
        dtype="float32",
        mesh__data=-1,
        mesh__fsdp=1,
        cpu_devices=2,
        checkpoint__every=100,
    )
