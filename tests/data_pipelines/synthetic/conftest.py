"""What several of these tests need: the small tokenizer, and settings for tiny pictures."""

import pytest

from data_pipelines.examples import Examples
from data_pipelines.settings import DataSettings
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.processing.config import ProcessorConfig
from vl3_jax.processing.packed_batch import BatchShape

SETTINGS = DataSettings(
    BatchShape(length=1024, patches=1024, vision_tokens=1024, samples=32),
    ProcessorConfig(max_tokens=512, min_tokens=4, image_merge=1, video_merge=2, threads=1),
    max_frame_patches=256,
)


@pytest.fixture(scope="session")
def tokenizer_file():
    return TOKENIZER


@pytest.fixture(scope="session")
def reader(tokenizer_file):
    """Records to samples."""
    return Examples(tokenizer_file, SETTINGS)
