"""Fine-tuning on own pictures.

The settings of stage 3, from the released image model, with half the budget.

    vl3 train --config configs/finetune_image.py --workdir RUN --config.data.root=FOLDER \
        --config.data.datasets.train.annotations=train.jsonl --config.data.datasets.train.media=media
"""

from data_pipelines.mixtures import Group, mixture
from vl3_jax.training.run_config import training_config

OWN_DATA = [Group("own", 0, ["train"])]


def get_config(variant: str = ""):
    """8,192 tokens and 16,384 patches a row."""
    return training_config(
        variant,
        model="2b",
        data=mixture(OWN_DATA, length=8192, patches=16_384, max_tokens=5120),
        learning_rates={"vision": 2e-6, "projector": 1e-5, "llm": 1e-5},
        init_from="DAMO-NLP-SG/VideoLLaMA3-2B-Image",
        batch__samples=32,
    )
