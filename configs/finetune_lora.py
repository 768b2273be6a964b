"""Fine-tuning of adapters (LoRA) on own data.

They sit on the language model of the released 2B; the projector learns too, the rest is frozen.

    vl3 train --config configs/finetune_lora.py --workdir RUN --config.data.root=FOLDER \
        --config.data.datasets.train.annotations=train.jsonl --config.data.datasets.train.media=media
    vl3 convert export RUN OUT --format peft --base DAMO-NLP-SG/VideoLLaMA3-2B
"""

from data_pipelines.mixtures import Group, mixture
from vl3_jax.training.run_config import training_config

OWN_DATA = [Group("own", 0, ["train"])]


def get_config(variant: str = ""):
    """Rank 64 and alpha 16, as the reference trainer has them."""
    return training_config(
        variant,
        model="2b",
        data=mixture(OWN_DATA, image_merge=2, length=8192, patches=20_480, max_tokens=5120),
        learning_rates={"lora": 1e-4, "vision": 0.0, "projector": 1e-5, "llm": 0.0},
        init_from="DAMO-NLP-SG/VideoLLaMA3-2B",
        batch__samples=32,
        lora__rank=64,
        lora__alpha=16.0,
    )
