"""Stage 4, video-centric fine-tuning: videos, live and timed, beside images at merge size 2 and text.

    vl3 train --config stage4:2b --workdir RUNS/stage4_2b --config.init_from=RUNS/stage3_2b --config.data.root=DATA

Variants: 2b, 7b; `mock` for a tiny run on synthetic data.
"""

from vl3_jax import config_file
from vl3_jax.training.run_config import train_config

LEARNING_RATES = {"vision": 2e-6, "projector": 1e-5, "llm": 1e-5}


def get_config(variant: str = "2b"):
    """Rows of 16,384 tokens and 40,960 patches; pruning on."""
    return train_config(variant, config_file.evaluate("data/stage4"), LEARNING_RATES)
