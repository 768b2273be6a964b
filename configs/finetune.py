"""Fine-tuning on data of one's own, of a model of any size, with half the paper's budget.

    vl3 train --config finetune:video --workdir RUN --config.init_from=MODEL --config.epochs=3 \
        --config.data.datasets.train.annotations=train.json --config.data.datasets.train.media=media

Variants: `video` and `image` train everything, by default from the released 2B and its image model; `lora` trains
adapters on the decoder, and the projector. Adapters are exported with

    vl3 convert export RUN OUT --format peft
"""

from data_pipelines.mixtures import Group, mixture
from vl3_jax.training import lora
from vl3_jax.training.run_config import ANY_SIZE, split_variant, train_config

OWN_DATA = [Group("own", 0, ["train"])]
BUDGET = {"root": "", "length": 8192, "max_tokens": 5120}
FULL_RATES = {"vision": 2e-6, "projector": 1e-5, "llm": 1e-5}
LORA_RATES = {"lora": 1e-4, "vision": 0.0, "projector": 1e-5, "llm": 0.0}


def get_config(variant: str = "video"):
    """Rows of 8,192 tokens and 20,480 patches, for images 16,384."""
    kind, is_mock = split_variant(variant, ("video", "image", "lora"))
    if kind == "image":
        data, released = mixture(OWN_DATA, patches=16_384, **BUDGET), "DAMO-NLP-SG/VideoLLaMA3-2B-Image"
    else:
        data, released = mixture(OWN_DATA, image_merge=2, patches=20_480, **BUDGET), "DAMO-NLP-SG/VideoLLaMA3-2B"
    return train_config(
        "mock" if is_mock else "",
        models=ANY_SIZE,
        data=data,
        learning_rates=LORA_RATES if kind == "lora" else FULL_RATES,
        init_from=released,
        batch__samples=32,
        **({"lora__rank": lora.RANK} if kind == "lora" else {}),
    )
