"""Tests that samples have their planned lengths, that long ones shrink by the rules, and that bad media are errors."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_datasets import SETTINGS, TOKENIZER, bad_records, good_records, turns, write_lines, write_media

from data_pipelines import sample_errors
from data_pipelines.mixtures import data_settings, mixture
from data_pipelines.packing.lengths import MediaInfo, SampleLengths, SampleSize, assign_frames, compute_sample_size
from data_pipelines.sample_builder import SampleBuilder, placeholder_sample, truncate
from data_pipelines.sample_errors import BadSampleError, SampleError
from data_pipelines.sources import Record, open_source
from data_pipelines.sources.media_resolver import MediaResolver
from support.samples import random_sample, random_visual
from vl3_jax.processing.packed_batch import BatchShape, CapacityError, pack
from vl3_jax.processing.processor import Processor

SEED = (0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_media(folder, videos=4)
    return folder


@pytest.fixture(scope="module")
def sample_builder():
    return SampleBuilder(TOKENIZER, SETTINGS)


def record(**fields):
    return Record(fields, "a.jsonl, line 1")


def build(sample_builder, folder, fields):
    """Returns the lengths, the size and the sample of a record."""
    media, source_record = MediaResolver(str(folder)), record(**fields)
    lengths = sample_builder.measure(source_record, media)[0]
    size = compute_sample_size(lengths, sample_builder.settings)
    return lengths, size, sample_builder.sample(source_record, media, size, SEED)


@pytest.mark.parametrize("number", range(11))
def test_planned_lengths_are_the_real_ones(sample_builder, folder, number):
    fields = [*good_records(10), {"video": ["still"], "conversations": turns("Q", "A")}][number]
    lengths, size, sample = build(pickle.loads(pickle.dumps(sample_builder)), folder, fields)
    text = int((~sample.is_vision).sum())
    before = sum(len(visual.keep) for visual in sample.visuals)
    assert lengths.text == text
    if not fields.get("stream"):
        assert size.tokens == text + before
        assert size.patches == sum(len(visual.patches) for visual in sample.visuals)
        assert size.frames == tuple((visual.patches_per_frame, visual.grid[0]) for visual in sample.visuals)
    kept = sample_builder.measure(record(**fields), MediaResolver(str(folder)), kept=True)[0]
    assert (
        compute_sample_size(kept, sample_builder.settings).tokens
        == len(sample.tokens)
        == text + sample.num_vision_tokens
    )
    assert (kept.text, len(kept.media)) == (lengths.text, len(lengths.media))
    if fields.get("video") == ["still"]:
        assert sum(medium.kept for medium in kept.media) < before


def test_a_sample_equals_the_output_of_the_processor(sample_builder, folder):
    fields = {"image": ["p1.png"], "conversations": turns("<image>\nWhich?", "That.")}
    _, _, sample = build(sample_builder, folder, fields)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": str(folder / "p1.png")}, "Which?"]},
        {"role": "assistant", "content": "That."},
    ]
    expected = Processor(sample_builder.tokenizer, SETTINGS.processor)(conversation, False, supervise=True).sample
    np.testing.assert_array_equal(sample.tokens, expected.tokens)
    np.testing.assert_array_equal(sample.loss_weight, expected.loss_weight)
    np.testing.assert_array_equal(sample.visuals[0].patches, expected.visuals[0].patches)
    assert sample_builder.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False) == "That.<|im_end|>"


def test_system_turns_are_not_supervised(sample_builder, folder):
    conversation = [{"from": "system", "value": "Be brief."}, *turns("Why?", "So.")]
    _, _, sample = build(sample_builder, folder, {"conversations": conversation})
    assert sample_builder.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False) == "So.<|im_end|>"
    assert sample_builder.tokenizer.decode(sample.tokens.tolist(), False).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )


def test_a_stream_interleaves_frames_and_turns_by_time(sample_builder, folder):
    conversation = [
        {"role": "user", "content": "Tell me.", "time": 1.0},
        {"role": "assistant", "content": "One.", "time": 2.4},
        {"role": "assistant", "content": "Two.", "time": 3.9},
    ]
    fields = {"video": ["v3.mp4"], "stream": True, "start_time": 1.0, "end_time": 9.0, "conversation": conversation}
    _, _, sample = build(sample_builder, folder, fields)
    text = sample_builder.tokenizer.decode(sample.tokens[~sample.is_vision].tolist(), False)
    frame = "<|stream_start|>stream\nTime {}s: \n<|stream_end|>"
    assert text == (
        frame.format("0.0") + "<|im_start|>user\nTell me.<|im_end|>\n"
        + frame.format("1.0") + "<|im_start|>assistant\nOne.<|im_end|>\n"
        + frame.format("2.0") + "<|im_start|>assistant\nTwo.<|im_end|>\n"
    )  # fmt: skip
    (visual,) = sample.visuals
    assert (visual.grid[0], visual.merge) == (3, 2)
    assert sample.is_vision.sum() == visual.num_tokens


def test_every_bad_record_is_an_error_with_its_location(sample_builder, folder, tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", bad_records(folder))
    source, media = open_source(path), MediaResolver(str(folder))
    kinds = []
    for index in range(len(source)):
        error = sample_builder.measure(source[index], media)
        if not isinstance(error, SampleError):  # the header is intact; the error shows up when decoding
            error = sample_builder.sample(source[index], media, compute_sample_size(error[0], SETTINGS), SEED)
        assert error.where == f"{path}, line {index + 1}"
        kinds.append(error.kind)
    assert kinds == [
        sample_errors.NOT_JSON,
        sample_errors.NOT_UTF8,
        sample_errors.EMPTY,
        sample_errors.MISSING,
        *[sample_errors.UNREADABLE] * 4,
        sample_errors.MISSING,
        sample_errors.TAGS,
    ]


def test_a_file_that_changed_since_it_was_indexed(sample_builder, folder):
    fields = {"image": ["p0.png", "p1.png"], "conversations": turns("Q", "A")}
    _, size, _ = build(sample_builder, folder, fields)
    smaller = dataclasses.replace(size, patches=size.patches - 1)
    error = sample_builder.sample(record(**fields), MediaResolver(str(folder)), smaller, SEED)
    assert (error.kind, "index the data again" in error.message) == (sample_errors.CHANGED, True)


def test_samples_that_are_too_long_shrink_and_are_cut_at_the_end(sample_builder, folder):
    training = data_settings(mixture())
    video = MediaInfo(True, 720, 1280, 32)
    free, long, longer = (
        compute_sample_size(SampleLengths(text, (video,)), training) for text in (100, 10_000, 14_000)
    )
    assert (free.vision_tokens, free.shrunk, free.cut) == (9568, False, 0)
    assert long.shrunk
    assert 4096 < long.vision_tokens <= 6384
    assert (long.tokens, long.cut) == (10_000 + long.vision_tokens, 0)
    assert (longer.tokens, longer.cut) == (16_384, longer.vision_tokens + 14_000 - 16_384)
    assert 3000 < longer.vision_tokens <= 4096
    still = compute_sample_size(SampleLengths(100, (dataclasses.replace(video, kept=500),)), training)
    assert (still.tokens, still.vision_tokens, still.patches) == (600, 500, free.patches)
    large = compute_sample_size(
        SampleLengths(100, (MediaInfo(False, 4000, 4000),)), dataclasses.replace(training, max_frame_patches=4096)
    )
    assert large.shrunk
    assert 3000 < large.patches <= 4096
    fields = {"image": ["p0.png"], "conversations": turns("Q", "word " * 600)}
    lengths, size, sample = build(sample_builder, folder, fields)
    assert len(sample.tokens) == 512 == size.tokens
    assert size.cut == lengths.text + size.vision_tokens - 512
    assert sample.num_vision_tokens == size.vision_tokens > 50


def test_truncation_cuts_text_and_vision_tokens():
    rng = np.random.default_rng(0)
    visuals = [random_visual(rng, (1, 2, 2), 1), random_visual(rng, (3, 2, 2), 1), random_visual(rng, (1, 2, 2), 1)]
    whole = random_sample(rng, visuals, text=5)
    for length in range(1, len(whole.tokens)):
        cut = truncate(whole, length)
        assert len(cut.tokens) == length
        assert cut.num_vision_tokens == whole.is_vision[:length].sum()
        frames = [visual.grid[0] for visual in cut.visuals]
        assert sum(frames) == -(-cut.num_vision_tokens // 4)
    assert truncate(whole, 100) is whole


MEDIA = st.builds(
    MediaInfo,
    st.booleans(),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(1, 8),
    st.just(-1),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 3000), st.lists(MEDIA, max_size=4), st.sampled_from([(1, 2), (2, 2)]), st.sampled_from([1, 3]))
def test_every_computed_size_fits_an_empty_row(text, media, merges, vision_rows):
    processor = dataclasses.replace(SETTINGS.processor, image_merge=merges[0], video_merge=merges[1])
    shape = dataclasses.replace(SETTINGS.shape, patches=1024 // vision_rows, vision_rows=vision_rows)
    config = dataclasses.replace(SETTINGS, processor=processor, shape=shape)
    media = tuple(medium if medium.is_video else dataclasses.replace(medium, frames=1) for medium in media)
    try:
        size = compute_sample_size(SampleLengths(text, media), config)
    except BadSampleError:
        # Only for many frames, or for media so narrow that their smallest size is still large.
        narrow = any(max(m.height, m.width) > 8 * min(m.height, m.width) for m in media)
        assert narrow or sum(medium.frames for medium in media) >= 8
        return
    assert size.tokens <= shape.length
    assert size.vision_tokens <= min(shape.vision_tokens, size.tokens)
    assert all(patches <= config.max_frame_patches for patches, _ in size.frames)
    assert assign_frames(size.frames, [shape.patches] * vision_rows) is not None
    assert size.shrunk == (size.budget < config.processor.max_tokens)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), max_size=6), st.integers(1, 3), st.integers(1, 20))
def test_frames_are_assigned_as_pack_assigns_them(frames, rows, patches):
    visuals = [random_visual(np.random.default_rng(0), (count, 1, size), 1) for size, count in frames]
    sample = random_sample(np.random.default_rng(0), visuals)
    shape = BatchShape(1000, patches, 1000, rows)
    left = assign_frames(frames, [patches] * rows)
    try:
        batch = pack([[sample]], shape)
    except CapacityError:
        assert left is None
        return
    np.testing.assert_array_equal((batch["patch_segment"][0] == 0).sum(axis=1), left)


def test_several_vision_rows_keep_their_plan(sample_builder, folder):
    """If a sample fails or loses frames, padding frames keep the vision rows of the samples after it."""
    size = SampleSize(10, 8, 24, ((4, 4), (8, 1)), 100)
    sample = placeholder_sample(size, 2)
    assert [(v.patches_per_frame, v.grid[0], v.num_tokens) for v in sample.visuals] == [(4, 4, 0), (8, 1, 0)]
    assert placeholder_sample(size, 1).visuals == () or placeholder_sample(size, 1).visuals == []
    shape = dataclasses.replace(SETTINGS.shape, vision_rows=2, patches=512)
    builder = SampleBuilder(TOKENIZER, dataclasses.replace(SETTINGS, shape=shape))
    stream = good_records(5)[4] | {"video": ["v2.mp4"], "end_time": 4.0}
    _, size, sample = build(builder, folder, stream)
    planned = dataclasses.replace(
        size, frames=tuple((patches, count + 2) for patches, count in size.frames), patches=9999
    )
    padded = builder.sample(record(**stream), MediaResolver(str(folder)), planned, SEED)
    assert sum(visual.grid[0] for visual in padded.visuals) == planned.frames[0][1]
    np.testing.assert_array_equal(padded.tokens, sample.tokens)
