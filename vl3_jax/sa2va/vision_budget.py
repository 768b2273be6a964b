"""How many vision tokens a model sees of what it draws in; a token is a block of 2 x 2 patches."""

import dataclasses

from vl3_jax.processing.processor_config import ProcessorConfig

DRAWING_MERGE = 2
KEY_FRAMES = 5  # of a video
LEAST_OF_IMAGE, LEAST_OF_FRAME = 512, 128  # vision tokens of an image, and of each key frame of a video
MOST_TOKENS = 2048  # of all of them together


def drawing_processor(config: ProcessorConfig, video: bool, most: int | None = None) -> ProcessorConfig:
    """Returns the settings with which media are processed for an answer with masks.

    Args:
      config: Settings of the checkpoint.
      video: Whether the images are key frames of a video.
      most: Most vision tokens; None is `MOST_TOKENS`.
    """
    most = most or MOST_TOKENS
    fewest = min(LEAST_OF_FRAME if video else LEAST_OF_IMAGE, most)
    return dataclasses.replace(config, image_merge=DRAWING_MERGE, min_tokens=fewest, max_tokens=most)
