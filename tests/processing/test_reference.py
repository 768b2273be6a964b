"""The same pixels, ids and pruning as the transformers port of VideoLLaMA3."""

import numpy as np
import pytest

from support.media import MEDIA, TOKENIZER
from vl3_jax.processing.patchify import normalise
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.processing.videos import open_video

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

GREY = (0.5, 0.5, 0.5)
BUDGET = {"image_mean": GREY, "image_std": GREY}
IMAGE_SIZE = {"shortest_edge": 16 * 196, "longest_edge": 16_384 * 196}
VIDEO_SIZE = {"shortest_edge": 16 * 784, "longest_edge": 16_384 * 784}
PICTURES = ["images/handwriting.png", "images/chart_seattle_rain.png", "images/huckleberry_page.jpg", "edge/city.webp"]
VIDEOS = ["videos/tree.avi", "edge/city_vfr.mp4", "edge/city_rotated90.mp4", "edge/city_odd_355x201.avi"]
QUESTION = "What is it? 中文 3.14"


@pytest.fixture(scope="module")
def port():
    """The port's classes; its torchvision path only where torchvision is installed."""
    from vl3_jax.bench.torchvision_ops import declare_operators

    declare_operators()
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
    classes["whole"] = VideoLlama3Processor(classes["image"], classes["tokenizer"], classes["video"])
    return classes


def needs(port, name):
    if name not in port:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision==0.28.0")
    return port[name]


@pytest.fixture(scope="module")
def native():
    config = ProcessorConfig(preprocess="native", native_placeholders=True)
    return Processor(Tokenizer.from_folder(TOKENIZER), config)


def ours(processor, kind, source, **options):
    return processor([{"role": "user", "content": [{"type": kind, kind: source, **options}, QUESTION]}])


def levels_apart(patches, pixel_values):
    """Absolute differences in grey levels of uint8 patches and the port's normalised float pixels."""
    return np.abs(patches.astype(float) - (np.asarray(pixel_values, np.float64) * 127.5 + 127.5))


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("merge", [1, 2])
def test_pixels_equal_the_pil_path(port, name, merge):
    from PIL import Image

    picture = Image.open(MEDIA / name).convert("RGB")
    size = {edge: pixels * merge**2 for edge, pixels in IMAGE_SIZE.items()}
    expected = port["pil"](picture, merge_size=merge, size=size, return_tensors="np")
    processor = Processor(Tokenizer.from_folder(TOKENIZER), ProcessorConfig(image_merge=merge))
    (visual,) = ours(processor, "image", str(MEDIA / name)).sample.visuals
    assert tuple(expected["image_grid_thw"][0]) == visual.grid
    np.testing.assert_array_equal(normalise(visual.patches, GREY, GREY), expected["pixel_values"])


@pytest.mark.parametrize("name", PICTURES)
def test_picture_prompts_equal_the_port(port, native, name):
    from PIL import Image

    whole = needs(port, "whole")
    text = f"<|im_start|>user\n<|image_pad|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    expected = whole(text=[text], images=[Image.open(MEDIA / name).convert("RGB")], return_tensors="pt")
    processed = ours(native, "image", str(MEDIA / name))
    assert processed.prompt_ids == expected["input_ids"][0].tolist()
    apart = levels_apart(processed.sample.visuals[0].patches, expected["pixel_values"])
    assert apart.max() <= 2.01
    assert np.mean(apart > 0.01) < 0.01


@pytest.mark.parametrize("name", VIDEOS)
def test_video_prompts_equal_the_port(port, native, name):
    """On the frames that we decode: ids with times and pruned tokens, pixels, and the mask on the port's own pixels."""
    from transformers.video_utils import VideoMetadata

    whole = needs(port, "whole")
    processed = ours(native, "video", str(MEDIA / name))
    clip = open_video(MEDIA / name, _native_options())
    frames = np.stack([np.asarray(frame) for frame in clip.frames()])
    rate = clip._table.rate
    metadata = VideoMetadata(total_num_frames=len(clip._table.starts), fps=rate, frames_indices=clip.indices)
    text = f"<|im_start|>user\n<|video_pad|>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    expected = whole(
        text=[text],
        videos=[torch.tensor(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    (visual,) = processed.sample.visuals
    assert tuple(expected["video_grid_thw"][0].tolist()) == visual.grid
    apart = levels_apart(visual.patches, expected["pixel_values_videos"])
    assert apart.max() <= 2.01
    assert np.mean(apart > 0.01) < 0.01

    mask = port["video"]._get_compression_mask(
        torch.tensor(normalise(visual.patches, GREY, GREY)), torch.tensor([visual.grid]), torch.tensor([2])
    )
    np.testing.assert_array_equal(visual.keep, mask.numpy())
    # Their own mask is of their own pixels, a level off here and there; ids are compared without pruning.
    unpruned = Processor(native.tokenizer, ProcessorConfig(**_without_pruning()))
    theirs = whole(
        text=[text],
        videos=[torch.tensor(frames).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        use_token_compression=False,
        return_tensors="pt",
    )
    assert ours(unpruned, "video", str(MEDIA / name)).prompt_ids == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("name", VIDEOS)
def test_native_frames_are_the_ports(port, name):
    from transformers.video_utils import VideoMetadata

    video = needs(port, "video")
    clip = open_video(MEDIA / name, _native_options())
    metadata = VideoMetadata(total_num_frames=len(clip._table.starts), fps=clip._table.rate)
    expected = video.sample_frames(metadata, fps=1, min_frames=4, max_frames=180, temporal_patch_size=1)
    assert clip.indices == expected.tolist()


def _native_options():
    from vl3_jax.processing.video_reader import FrameSamplingOptions

    return FrameSamplingOptions(preprocess="native")


def _without_pruning():
    return {"preprocess": "native", "native_placeholders": True, "prune_threshold": None}
