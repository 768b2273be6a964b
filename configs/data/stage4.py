"""Stage 4, video-centric fine-tuning: long, live and timed video beside images and text (paper, table 4)."""

from data_pipelines.mixtures import Group, mixture
from vl3_jax import config_file

STAGE_3_VIDEO = [name for name, data in config_file.evaluate("data/stage3").datasets.items() if data.task == "video"]
# The table lists the videos of stage 3 without this set: temporal grounding is a task of its own here.
GROUNDING = "temporal-grounding-in-house"
VIDEO_GENERAL = [*(name for name in STAGE_3_VIDEO if name != GROUNDING), "VideoRefer", "Panda-synthetic-in-house"]
GROUPS = [
    Group("video", 3_030_000, VIDEO_GENERAL, {"Panda-synthetic-in-house": 242_000}),
    Group("streaming", 36_200, ["ActivityNet-stream", "YouCook2-stream", "Ego4D-narration", "Ego4D-livechat"]),
    Group(
        "temporal grounding",
        210_000,
        [
            "ActivityNet-grounding",
            "YouCook2-grounding",
            "ViTT",
            "QuerYD",
            "HiREST",
            "Charades-STA",
            "Moment-10M",
            "COIN",
        ],
    ),
    Group("image", 880_000, ["LLaVA-SFT-665K", "LLaVA-OV-SI"], {"LLaVA-SFT-665K": 665_000}),
    Group("text", 1_560_000, ["Magpie", "Tulu-3"]),
]


def get_config():
    """5.72 million samples, by the amounts as printed; images and videos at merge size 2."""
    return mixture(GROUPS, image_merge=2, shorter_lengths=(11_264,))
