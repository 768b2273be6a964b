"""Stage 1, vision encoder adaptation: tower and projector are trained on images with captions, the decoder is frozen.

    vl3 convert init --vision google/siglip-so400m-patch14-384 --llm Qwen/Qwen2.5-1.5B-Instruct INIT
    vl3 train --config stage1:2b --workdir RUNS/stage1_2b --config.init_from=INIT --config.data.root=DATA

The 7B starts from the tower of the trained 2B. The paper does not say after which stage: that it is the last one, and
that the decoder is the Instruct model, as that of the 2B is, are assumptions of this project.

    vl3 convert export RUNS/stage4_2b RUNS/stage4_2b_exported --format official
    vl3 convert init --vision RUNS/stage4_2b_exported --llm Qwen/Qwen2.5-7B-Instruct INIT
    vl3 train --config stage1:7b --workdir RUNS/stage1_7b --config.init_from=INIT --config.data.root=DATA
"""

from vl3_jax import config_file
from vl3_jax.training.run_config import train_config

LEARNING_RATES = {"vision": 1e-5, "projector": 1e-3, "llm": 0.0}


def get_config(variant: str = "2b"):
    """Rows of 16,384 tokens and 16,384 patches."""
    return train_config(variant, config_file.evaluate("data/stage1"), LEARNING_RATES)
