"""Stage 1, vision encoder adaptation: images of any resolution with captions (paper, table 1)."""

from data_pipelines.mixtures import Group, mixture

GROUPS = [
    Group(
        "scene image",
        11_840_000,
        ["VL3-Syn7M-short", "LLaVA-Pretrain-558k", "Objects365-Recap", "SA-1B-Recap"],
        {"VL3-Syn7M-short": 7_000_000, "LLaVA-Pretrain-558k": 558_000},
    ),
    Group("scene text", 930_000, ["BLIP3-OCR-Recap"], {"BLIP3-OCR-Recap": 930_000}),
    Group("document", 2_800_000, ["pdfa-eng-wds", "idl-wds"]),
]


def get_config():
    """15.57 million samples; images at merge size 1, so 16,384 patches fill a row."""
    return mixture(GROUPS, patches=16_384, prune_threshold=None)
