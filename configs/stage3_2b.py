"""Stage 3 of the 2B, multi-task fine-tuning.

Instructions on pictures and text, and the first videos.

    vl3 train --config configs/stage3_2b.py --workdir RUNS/stage3_2b \
        --config.init_from=RUNS/stage2_2b --config.data.root=DATA
"""

import pathlib

from vl3_jax.training.run_config import training_config

MIXTURE = pathlib.Path(__file__).parent / "data" / "stage3.py"


def get_config(variant: str = ""):
    """16,384 tokens and 40,960 patches a row; pruning on."""
    return training_config(
        variant,
        model="2b",
        data=MIXTURE,
        learning_rates={"vision": 2e-6, "projector": 1e-5, "llm": 1e-5},
    )
