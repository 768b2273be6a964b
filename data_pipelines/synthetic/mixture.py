"""The data of the tiny model's stages as a configuration: one data set, and so one loss, for each task."""

from ml_collections import ConfigDict

from data_pipelines.mixtures import SEED, Group, mixture
from data_pipelines.synthetic.stages import sources


def stage_mixture(stage: int, samples: int) -> ConfigDict:
    """What a stage learns from. With the setting `seed`, which is that of the drawing, every stage draws its own.

    Args:
      stage: 0 to 4.
      samples: of an epoch; they are drawn when they are read.
    """
    found = sources(stage, samples, f"{SEED}{stage}")
    config = mixture(
        [Group(task, 0, [task]) for task in found],
        root="",
        length=1024,
        patches=1152,
        vision_tokens=896,
        samples=48,
        max_tokens=512,
        min_tokens=4,  # frames of 56 pixels are not enlarged
        max_frames=32,
        max_frame_patches=256,
    )
    for task, url in found.items():
        config.datasets[task].annotations = (url,)
        config.datasets[task].media = ""
    return config
