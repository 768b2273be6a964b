"""Fixtures of the tests of synthetic data: the small tokenizer, and a sample builder for tiny images."""

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
def builder(tokenizer_file):
    return SampleBuilder(tokenizer_file, SETTINGS)
