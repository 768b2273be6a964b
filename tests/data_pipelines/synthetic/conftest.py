"""What several of these tests need: the small tokenizer, and settings for tiny pictures."""

import pytest

from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.settings import DataSettings
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.processor_config import ProcessorConfig

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
    return SampleBuilder(tokenizer_file, SETTINGS)
