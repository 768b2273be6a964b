"""Stage 1 of the 7B, vision encoder adaptation.

Tower and projector learn on pictures with captions, the language model is frozen. It begins from the tower of the
tuned 2B.

    vl3 convert export RUNS/stage4_2b RUNS/stage4_2b_exported --format official
    vl3 convert init --vision RUNS/stage4_2b_exported --llm Qwen/Qwen2.5-7B-Instruct START
    vl3 train --config configs/stage1_7b.py --workdir RUNS/stage1_7b \
        --config.init_from=START --config.data.root=DATA
"""

import pathlib

from vl3_jax.training.run_config import training_config

MIXTURE = pathlib.Path(__file__).parent / "data" / "stage1.py"


def get_config(variant: str = ""):
    """16,384 tokens and 16,384 patches a row."""
    return training_config(
        variant,
        model="7b",
        data=MIXTURE,
        learning_rates={"vision": 1e-5, "projector": 1e-3, "llm": 0.0},
    )
