"""Stage 2 of the 7B, vision-language alignment.

Everything learns: detailed captions, documents, charts, regions, text.

    vl3 train --config configs/stage2_7b.py --workdir RUNS/stage2_7b \
        --config.init_from=RUNS/stage1_7b --config.data.root=DATA
"""

import pathlib

from vl3_jax.training.run_config import training_config

MIXTURE = pathlib.Path(__file__).parent / "data" / "stage2.py"


def get_config(variant: str = ""):
    """16,384 tokens and 16,384 patches a row."""
    return training_config(
        variant,
        model="7b",
        data=MIXTURE,
        learning_rates={"vision": 2e-6, "projector": 1e-5, "llm": 1e-5},
    )
