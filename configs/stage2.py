"""Stage 2, vision-language alignment: everything is trained on detailed captions, documents, charts, regions, text.

    vl3 train --config stage2:2b --workdir RUNS/stage2_2b --config.init_from=RUNS/stage1_2b --config.data.root=DATA

Variants: 2b, 7b; `mock` for a tiny run on synthetic data.
"""

from vl3_jax import config_file
from vl3_jax.training.run_config import train_config

LEARNING_RATES = {"vision": 2e-6, "projector": 1e-5, "llm": 1e-5}


def get_config(variant: str = "2b"):
    """Rows of 16,384 tokens and 16,384 patches."""
    return train_config(variant, config_file.evaluate("data/stage2"), LEARNING_RATES)
