"""Tests that pixels, token ids and pruning equal those of the transformers port of VideoLLaMA3."""

import io

import numpy as np
import pytest
from PIL import Image

from support.media import AWKWARD, MEDIA, TOKENIZER
from vl3_jax.processing.patchify import normalise
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.processing.videos import open_video

torch = pytest.importorskip("support.reference").torch

GREY = (0.5, 0.5, 0.5)
BUDGET = {"image_mean": GREY, "image_std": GREY}
IMAGE_SIZE = {"shortest_edge": 16 * 196, "longest_edge": 16_384 * 196}
VIDEO_SIZE = {"shortest_edge": 16 * 784, "longest_edge": 16_384 * 784}
IMAGES = ["images/handwriting.png", "images/chart_seattle_rain.png", "images/huckleberry_page.jpg", "edge/city.webp"]
VIDEOS = ["videos/tree.avi", "edge/city_vfr.mp4", "edge/city_rotated90.mp4", "edge/city_odd_355x201.avi"]
QUESTION = "What is it? 中文 3.14"


@pytest.fixture(scope="module")
def port():
    """Processors of the port by name; those that need torchvision only where it is installed."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.video_llama_3 import image_processing_pil_video_llama_3 as pil

    classes = {
        "pil": pil.VideoLlama3ImageProcessorPil(size=IMAGE_SIZE, **BUDGET),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json")),
    }
    try:
        from transformers.models.video_llama_3.image_processing_video_llama_3 import VideoLlama3ImageProcessor
        from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
        from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor
    except ImportError:
        return classes
    classes["image"] = VideoLlama3ImageProcessor(size=IMAGE_SIZE, **BUDGET)
    classes["video"] = VideoLlama3VideoProcessor(
        size=VIDEO_SIZE, merge_size=2, use_token_compression=True, return_metadata=True, **BUDGET
    )
    classes["processor"] = VideoLlama3Processor(classes["image"], classes["tokenizer"], classes["video"])
    return classes


def require(port, name):
    if name not in port:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision==0.28.0")
    return port[name]


@pytest.fixture(scope="module")
def native():
    config = ProcessorConfig(preprocess="native", native_placeholders=True)
    return Processor(Tokenizer.from_folder(TOKENIZER), config)


def process(processor, kind, source, **options):
    return processor([{"role": "user", "content": [{"type": kind, kind: source, **options}, QUESTION]}])


def grey_level_differences(patches, pixel_values):
    """Returns the absolute differences in grey levels of uint8 patches and the port's normalised float pixels."""
    return np.abs(patches.astype(float) - (np.asarray(pixel_values, np.float64) * 127.5 + 127.5))


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("merge", [1, 2])
def test_pixels_equal_the_pil_processor(port, name, merge):
    image = Image.open(MEDIA / name)
    size = {edge: pixels * merge**2 for edge, pixels in IMAGE_SIZE.items()}
    expected = port["pil"](image, merge_size=merge, size=size, return_tensors="np")
    processor = Processor(Tokenizer.from_folder(TOKENIZER), ProcessorConfig(image_merge=merge))
    (visual,) = process(processor, "image", str(MEDIA / name)).sample.visuals
    assert tuple(expected["image_grid_thw"][0]) == visual.grid
    np.testing.assert_array_equal(normalise(visual.patches, GREY, GREY), expected["pixel_values"])


@pytest.mark.parametrize(
    ("mode", "kind", "transparency"),
    [
        ("RGBA", "PNG", None),
        ("LA", "PNG", None),
        ("RGBA", "WEBP", None),
        ("RGBA", "TIFF", None),
        ("P", "PNG", 0),
        ("P", "PNG", bytes(range(0, 256, 16))),
        ("RGB", "PNG", (0, 0, 0)),
        ("L", "PNG", 0),
        ("1", "PNG", 0),
        ("PA", None, None),
    ],
)
@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_transparency_equals_the_port(port, native, mode, kind, transparency, preprocess):
    """The port composites on white. Here it gets the images as they are."""
    ink = Image.open(AWKWARD / "ink_rgba.png")
    image = ink.convert("RGB").quantize(16) if mode == "P" else ink.convert(mode)
    if kind:
        file = io.BytesIO()
        image.save(file, kind, **({} if transparency is None else {"transparency": transparency}))
        image = Image.open(file)
    expected = port["pil"](image, return_tensors="np")
    processor = Processor(native.tokenizer, ProcessorConfig(preprocess=preprocess))
    processed = process(processor, "image", file.getvalue() if kind else image)
    np.testing.assert_array_equal(normalise(processed.sample.visuals[0].patches, GREY, GREY), expected["pixel_values"])
    notes = [warning for warning in processed.warnings if "transparent; shown on white" in warning]
    assert len(notes) == (preprocess == "official")


@pytest.mark.parametrize("name", ["ink_rgba.png", "ink_p.png"])
def test_transparent_ink_equals_the_port(port, native, name):
    expected = port["pil"](Image.open(AWKWARD / name), return_tensors="np")
    processed = process(native, "image", str(AWKWARD / name))
    np.testing.assert_array_equal(normalise(processed.sample.visuals[0].patches, GREY, GREY), expected["pixel_values"])


@pytest.mark.parametrize("name", IMAGES)
def test_image_prompts_equal_the_port(port, native, name):
    processor = require(port, "processor")
    text = f"<|im_start|>user\n<|image_pad|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text=[text], images=[Image.open(MEDIA / name)], return_tensors="pt")
    processed = process(native, "image", str(MEDIA / name))
    assert processed.sample.tokens.tolist() == expected["input_ids"][0].tolist()
    difference = grey_level_differences(processed.sample.visuals[0].patches, expected["pixel_values"])
    assert difference.max() <= 2.01
    assert np.mean(difference > 0.01) < 0.01


@pytest.mark.parametrize("name", VIDEOS)
def test_video_prompts_equal_the_port(port, native, name):
    """Compares pixels, the pruning mask and token ids with times on the frames that the reader decodes."""
    from transformers.video_utils import VideoMetadata

    processor = require(port, "processor")
    processed = process(native, "video", str(MEDIA / name))
    reader = open_video(MEDIA / name, _native_options())
    frames = np.stack([np.asarray(frame) for frame in reader.frames()])
    rate = reader._table.rate
    metadata = VideoMetadata(total_num_frames=len(reader._table.starts), fps=rate, frames_indices=reader.indices)
    text = f"<|im_start|>user\n<|video_pad|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(
        text=[text],
        videos=[torch.tensor(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    (visual,) = processed.sample.visuals
    assert tuple(expected["video_grid_thw"][0].tolist()) == visual.grid
    difference = grey_level_differences(visual.patches, expected["pixel_values_videos"])
    assert difference.max() <= 2.01
    assert np.mean(difference > 0.01) < 0.01

    mask = port["video"]._get_compression_mask(
        torch.tensor(normalise(visual.patches, GREY, GREY)), torch.tensor([visual.grid]), torch.tensor([2])
    )
    np.testing.assert_array_equal(visual.keep, mask.numpy())
    # The port computes its mask from its own pixels, some of which differ by a grey level, so the ids are compared
    # without pruning.
    unpruned = Processor(native.tokenizer, ProcessorConfig(**_without_pruning()))
    expected_unpruned = processor(
        text=[text],
        videos=[torch.tensor(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        use_token_compression=False,
        return_tensors="pt",
    )
    assert (
        process(unpruned, "video", str(MEDIA / name)).sample.tokens.tolist()
        == expected_unpruned["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("name", VIDEOS)
def test_native_frame_indices_equal_the_port(port, name):
    from transformers.video_utils import VideoMetadata

    video_processor = require(port, "video")
    reader = open_video(MEDIA / name, _native_options())
    metadata = VideoMetadata(total_num_frames=len(reader._table.starts), fps=reader._table.rate)
    expected = video_processor.sample_frames(metadata, fps=1, min_frames=4, max_frames=180, temporal_patch_size=1)
    assert reader.indices == expected.tolist()


def _native_options():
    from vl3_jax.processing.video_reader import FrameSamplingOptions

    return FrameSamplingOptions(preprocess="native")


def _without_pruning():
    return {"preprocess": "native", "native_placeholders": True, "prune_threshold": None}
