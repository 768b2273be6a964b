"""Stage 4 of the 2B, video-centric fine-tuning.

Videos, live and timed, beside pictures and text; pictures at merge size 2.

    vl3 train --config configs/stage4_2b.py --workdir RUNS/stage4_2b \
        --config.init_from=RUNS/stage3_2b --config.data.root=DATA
"""

import pathlib

from vl3_jax.training.run_config import training_config

MIXTURE = pathlib.Path(__file__).parent / "data" / "stage4.py"


def get_config(variant: str = ""):
    """16,384 tokens and 40,960 patches a row; pruning on."""
    return training_config(
        variant,
        model="2b",
        data=MIXTURE,
        learning_rates={"vision": 2e-6, "projector": 1e-5, "llm": 1e-5},
    )
