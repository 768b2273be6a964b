"""The data configuration of nano's training stages: one data set, and therefore one logged loss, per task."""

from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.mixtures import SEED_PLACE, MixtureConfig
from data_pipelines.synthetic.stages import sources


def stage_mixture(stage: int, samples: int) -> MixtureConfig:
    """Returns the data configuration of a stage.

    The samples depend on the configuration's `seed` and on the stage, so no two stages see the same ones.

    Args:
      stage: Number of the stage, 0 to 4.
      samples: Number of samples in an epoch; each is generated when it is read.
    """
    urls = sources(stage, samples, f"{SEED_PLACE}{stage}")
    return MixtureConfig(
        amounts=dict.fromkeys(urls, 0),
        datasets={task: DatasetSpec(task, (url,), task=task) for task, url in urls.items()},
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
