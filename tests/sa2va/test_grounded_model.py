"""Answers with masks, as a user asks for them: images, videos in both ways, batches, regions, and what goes wrong."""

import numpy as np
import pytest
from PIL import Image

import vl3_jax as vl3
from support.adapters import write_adapter
from support.sa2va_models import write_small_sa2va
from support.tolerances import REORDERED, relative_error
from vl3_jax.checkpoint import open_source
from vl3_jax.errors import InputError
from vl3_jax.inference.grounded_model import GroundedModel, MaskRequest
from vl3_jax.inference.mask_drawer import choose_key_frames
from vl3_jax.processing.object_prompts import Prompt, input_mask
from vl3_jax.sa2va.templates import GROUNDED_CAPTION

SHORT = {"max_new_tokens": 3, "max_visual_tokens": 16}
IMAGE = np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8)
GREY = np.full((90, 70, 3), 80, np.uint8)  # of which the model draws nothing
FRAMES = [np.roll(IMAGE, 8 * shift, axis=1) for shift in range(6)]
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_sa2va(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(folder) -> GroundedModel:
    return vl3.load(folder)


def test_an_image(model):
    result = model.segment("the red car", image=IMAGE, **SHORT)
    assert result.grounded.text == "[SEG][SEG][SEG]"
    assert result.finish_reason == "length"
    assert result.names == ["1", "2", "3"]
    assert result.vectors.shape == (3, 64)
    assert len({vector.tobytes() for vector in result.vectors}) == 3
    assert result.masks.shape == (3, 120, 160)
    assert (result.mask == result.masks.any(0)).all()
    assert 0 < result.mask.mean() < 1
    (frame,) = result.frames()
    assert (frame.index, frame.objects, frame.size) == (0, (1, 2, 3), (120, 160))


def test_no_object_is_an_empty_mask(model):
    result = model.segment("a", image=GREY, **SHORT)
    assert (result.names, result.masks.shape, result.mask.shape) == ([], (0, 90, 70), (90, 70))
    assert not result.mask.any()
    frames = list(model.segment("a", video=[GREY] * 2, **SHORT).frames())
    assert [frame.masks.shape for frame in frames] == [(0, 90, 70)] * 2


def test_a_cancelled_answer_has_the_objects_that_were_read(tmp_path):
    """Of three `[SEG]` that are generated, two are read: the last one would be, for the token behind it."""
    model = vl3.load(write_small_sa2va(tmp_path, draws="always"))
    question = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, "Please segment the car."]}]
    whole = model.answer(question, **SHORT)
    answering = model.submit(question, **SHORT)
    while len(answering.generation.tokens) < 3:
        model.engine.step()
    answering.cancel()
    result = answering.result()
    assert result.token_ids == whole.token_ids
    assert (len(whole.vectors), len(result.vectors)) == (len(whole.names), len(result.names)) == (3, 2)


def test_ten_in_a_batch_equal_each_alone(model):
    """More than the engine has rows: images and videos in both ways, of several sizes, with and without objects."""
    requests = [
        MaskRequest("the red car", IMAGE),
        MaskRequest("a", GREY),
        MaskRequest("dogs?", IMAGE),
        MaskRequest("the dog", video=FRAMES[:2]),
        MaskRequest("the dog", video=FRAMES[:3], mode="sa2va_i", key_frames=2),
        MaskRequest(GROUNDED_CAPTION, IMAGE, verbatim=True),
        MaskRequest("the red car", IMAGE[:, :80]),
        MaskRequest("Please segment all cats.", FRAMES[3]),
        MaskRequest("a", video=[GREY] * 2),
        MaskRequest("the red car", IMAGE[40:]),
    ]
    drawn = 0
    for request, together in zip(requests, model.segment_batch(requests, **SHORT), strict=True):
        (alone,) = model.segment_batch([request], **SHORT)
        assert together.token_ids == alone.token_ids
        if not len(alone.vectors):
            continue
        assert relative_error(together.vectors, alone.vectors) <= REORDERED
        for ours, theirs in zip(together.frames(), alone.frames(), strict=True):
            assert relative_error(ours.logits, theirs.logits) <= REORDERED
        drawn += 1
    assert 5 <= drawn < len(requests)


def test_a_video_is_tracked_from_its_first_frames(model):
    result = model.segment("the red car", video=FRAMES, key_frames=2, **SHORT)
    assert result.processed.sample.visuals[1].grid[0] == 1, "frames are shown as images"
    assert len(result.processed.sample.visuals) == 2
    frames = list(result.frames())
    assert [frame.index for frame in frames] == list(range(6))
    for frame in frames[:2]:
        drawn = model.drawer.draw(FRAMES[frame.index], result.vectors)
        assert relative_error(frame.logits, drawn.logits) <= REORDERED
    assert any((frames[5].logits != frame.logits).any() for frame in frames[:2])
    assert result.masks.shape == (6, len(result.vectors), 120, 160)
    assert result.mask.shape == (6, 120, 160)


@pytest.mark.slow
def test_the_other_way_prompts_the_untrained_half_with_masks(model):
    result = model.segment("the red car", video=FRAMES, key_frames=2, mode="sa2va_i", **SHORT)
    assert result.canvas.key_frames == [0, 5]
    frames, size = list(result.frames()), model.drawer.stock.model.config.image_size
    for index in (0, 5):
        drawn = model.drawer.draw(FRAMES[index], result.vectors).masks
        for mask, logits in zip(drawn, frames[index].logits, strict=True):
            given = Image.fromarray(20 * input_mask(mask, size) - 10)  # what SAM-2 makes of a mask
            small = given.resize(logits.shape, Image.Resampling.BILINEAR)
            assert relative_error(logits, small) <= REORDERED


@pytest.mark.slow
def test_a_correction(model):
    result = model.segment("the red car", video=FRAMES[:4], key_frames=1, **SHORT)
    click = Prompt(frame=3, obj=1, points=[(10, 10, 0)], correction=True)
    plain, corrected = list(result.frames()), list(result.frames([click]))
    assert (plain[2].logits == corrected[2].logits).all()
    assert (plain[3].logits != corrected[3].logits).any()
    with pytest.raises(InputError, match="belong to a video"):
        list(model.segment("the red car", image=IMAGE, **SHORT).frames([click]))


def test_masks_are_described(model):
    """The loop of a mask and a caption: an object of an answer is a region of the next question."""
    masks = model.segment("the red car", image=IMAGE, **SHORT).masks
    assert isinstance(model.describe(IMAGE, masks[:1], **SHORT), str)
    with pytest.raises(InputError, match="region 1: its mask is empty"):
        model.describe(IMAGE, [np.zeros((4, 4), bool)], **SHORT)


def test_chat_is_that_of_the_base(tmp_path):
    """Bit by bit, with the adapter of what was learned beside the weights, where a request does without it."""
    folder = write_small_sa2va(tmp_path, draws="new", vocab_size=1280)
    config = open_source(tmp_path / "vl3").config
    adapter = write_adapter(tmp_path / "masks", config, base=tmp_path / "vl3")
    joined, base = vl3.load(folder, adapters={"masks": adapter}), vl3.load(tmp_path / "vl3")
    question = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, "What is it?"]}]
    settings = {"max_new_tokens": 8, "max_visual_tokens": 16, "logprobs": 5}
    answers = [model.answer(question, **settings) for model in (base, joined)]
    adapted = joined.answer(question, **settings, adapter="masks")
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs
    assert answers[0].logprobs != adapted.logprobs
    with pytest.raises(InputError, match="draws no masks"):
        base.segment("a car", image=IMAGE)


@pytest.mark.parametrize(
    ("count", "chosen", "mode", "expected"),
    [
        (9, None, "sa2va", [0, 1, 2, 3, 4]),
        (9, None, "sa2va_i", [0, 2, 4, 6, 8]),
        (3, 5, "sa2va", [0, 1, 2]),
        (3, 5, "sa2va_i", [0, 1, 2]),
        (10, 3, "sa2va_i", [0, 4, 9]),
        (10, [7, 2, 2], "sa2va", [2, 7]),
        (1, None, "sa2va_i", [0]),
    ],
)
def test_key_frames(count, chosen, mode, expected):
    assert choose_key_frames(count, chosen, mode) == expected


def test_errors(model):
    for count, chosen in ((0, None), (4, 0), (4, []), (4, [4])):
        with pytest.raises(InputError, match="key frames"):
            choose_key_frames(count, chosen, "sa2va")
    for media in ({}, {"image": IMAGE, "video": FRAMES}):
        with pytest.raises(InputError, match="one image or one video"):
            model.segment("a", **media)
    with pytest.raises(InputError, match="nothing to draw"):
        model.segment(" ", image=IMAGE)
    with pytest.raises(InputError, match="mode is 'x'"):
        list(model.segment("the red car", video=FRAMES[:1], mode="x", key_frames=[0], **SHORT).frames())
