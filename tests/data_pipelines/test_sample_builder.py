"""Records to samples: planned lengths are the real ones, over-long samples shrink by rule, bad media are problems."""

import dataclasses
import pickle

import numpy as np
import pytest
from corpora import SETTINGS, TOKENIZER, bad_records, good_records, turns, write_lines, write_media
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import sample_errors
from data_pipelines.lengths import MediaInfo, SampleLengths, SampleSize, assign_frames, compute_sample_size
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.sample_builder import SampleBuilder, placeholder_sample, truncate
from data_pipelines.sample_errors import BadSampleError, SampleError
from data_pipelines.settings import DataSettings
from data_pipelines.sources import Record, open_source
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
def examples():
    return SampleBuilder(TOKENIZER, SETTINGS)


def record(**fields):
    return Record(fields, "a.jsonl, line 1")


def made(examples, folder, fields):
    """Lengths, room and sample of a record."""
    media, there = MediaResolver(str(folder)), record(**fields)
    lengths = examples.lengths(there, media)
    place = compute_sample_size(lengths, examples.settings)
    return lengths, place, examples.sample(there, media, place, SEED)


@pytest.mark.parametrize("number", range(11))
def test_planned_lengths_are_the_real_ones(examples, folder, number):
    fields = [*good_records(10), {"video": ["still"], "conversations": turns("Q", "A")}][number]
    lengths, place, sample = made(pickle.loads(pickle.dumps(examples)), folder, fields)
    text = int((~sample.is_vision).sum())
    before = sum(len(visual.keep) for visual in sample.visuals)
    assert lengths.text == text
    if not fields.get("stream"):
        assert place.tokens == text + before
        assert place.patches == sum(len(visual.patches) for visual in sample.visuals)
        assert place.frames == tuple((visual.patches_per_frame, visual.grid[0]) for visual in sample.visuals)
    kept = examples.lengths(record(**fields), MediaResolver(str(folder)), kept=True)
    assert compute_sample_size(kept, examples.settings).tokens == len(sample.tokens) == text + sample.num_vision_tokens
    assert (kept.text, len(kept.media)) == (lengths.text, len(lengths.media))
    if fields.get("video") == ["still"]:
        assert sum(medium.kept for medium in kept.media) < before


def test_a_sample_is_what_the_processor_makes(examples, folder):
    fields = {"image": ["p1.png"], "conversations": turns("<image>\nWhich?", "That.")}
    _, _, sample = made(examples, folder, fields)
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": str(folder / "p1.png")}, "Which?"]},
        {"role": "assistant", "content": "That."},
    ]
    expected = Processor(examples.tokenizer, SETTINGS.processor)(conversation, False, supervise=True).sample
    np.testing.assert_array_equal(sample.tokens, expected.tokens)
    np.testing.assert_array_equal(sample.loss_weight, expected.loss_weight)
    np.testing.assert_array_equal(sample.visuals[0].patches, expected.visuals[0].patches)
    assert examples.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False) == "That.<|im_end|>"


def test_system_turns_are_not_learned(examples, folder):
    said = [{"from": "system", "value": "Be brief."}, *turns("Why?", "So.")]
    _, _, sample = made(examples, folder, {"conversations": said})
    assert examples.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False) == "So.<|im_end|>"
    assert examples.tokenizer.decode(sample.tokens.tolist(), False).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )


def test_a_stream_shows_each_frame_before_what_is_said_after_it(examples, folder):
    said = [
        {"role": "user", "content": "Tell me.", "time": 1.0},
        {"role": "assistant", "content": "One.", "time": 2.4},
        {"role": "assistant", "content": "Two.", "time": 3.9},
    ]
    fields = {"video": ["v3.mp4"], "stream": True, "start_time": 1.0, "end_time": 9.0, "conversation": said}
    _, _, sample = made(examples, folder, fields)
    text = examples.tokenizer.decode(sample.tokens[~sample.is_vision].tolist(), False)
    frame = "<|stream_start|>stream\nTime {}s: \n<|stream_end|>"
    assert text == (
        frame.format("0.0") + "<|im_start|>user\nTell me.<|im_end|>\n"
        + frame.format("1.0") + "<|im_start|>assistant\nOne.<|im_end|>\n"
        + frame.format("2.0") + "<|im_start|>assistant\nTwo.<|im_end|>\n"
    )  # fmt: skip
    (visual,) = sample.visuals
    assert (visual.grid[0], visual.merge) == (3, 2)
    assert sample.is_vision.sum() == visual.num_tokens


def test_every_bad_record_is_a_problem_with_its_place(examples, folder, tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", bad_records(folder))
    source, media = open_source(path), MediaResolver(str(folder))
    kinds = []
    for index in range(len(source)):
        problem = examples.lengths(source[index], media)
        if not isinstance(problem, SampleError):  # the header alone is well
            problem = examples.sample(source[index], media, compute_sample_size(problem, SETTINGS), SEED)
        assert problem.where == f"{path}, line {index + 1}"
        kinds.append(problem.kind)
    assert kinds == [
        sample_errors.NOT_JSON,
        sample_errors.NOT_UTF8,
        sample_errors.EMPTY,
        sample_errors.MISSING,
        *[sample_errors.UNREADABLE] * 4,
        sample_errors.MISSING,
        sample_errors.TAGS,
    ]


def test_a_file_that_changed_since_it_was_indexed(examples, folder):
    fields = {"image": ["p0.png", "p1.png"], "conversations": turns("Q", "A")}
    _, place, _ = made(examples, folder, fields)
    smaller = dataclasses.replace(place, patches=place.patches - 1)
    problem = examples.sample(record(**fields), MediaResolver(str(folder)), smaller, SEED)
    assert (problem.kind, "index the data again" in problem.message) == (sample_errors.CHANGED, True)


def test_over_long_samples_shrink_and_are_cut_at_the_end(examples, folder):
    training = DataSettings()
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
    lengths, place, sample = made(examples, folder, fields)
    assert len(sample.tokens) == 512 == place.tokens
    assert place.cut == lengths.text + place.vision_tokens - 512
    assert sample.num_vision_tokens == place.vision_tokens > 50


def test_text_is_cut_in_front_of_its_picture():
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


SIZES = st.builds(
    MediaInfo,
    st.booleans(),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(1, 8),
    st.just(-1),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(4, 3000), st.lists(SIZES, max_size=4), st.sampled_from([(1, 2), (2, 2)]), st.sampled_from([1, 3]))
def test_whatever_is_planned_fits_an_empty_row(text, media, merges, vision_rows):
    processor = dataclasses.replace(SETTINGS.processor, image_merge=merges[0], video_merge=merges[1])
    shape = dataclasses.replace(SETTINGS.shape, patches=1024 // vision_rows, vision_rows=vision_rows)
    config = dataclasses.replace(SETTINGS, processor=processor, shape=shape)
    media = tuple(medium if medium.is_video else dataclasses.replace(medium, frames=1) for medium in media)
    try:
        place = compute_sample_size(SampleLengths(text, media), config)
    except BadSampleError:
        # Only what is many frames, or so narrow that its smallest size is still large.
        narrow = any(max(m.height, m.width) > 8 * min(m.height, m.width) for m in media)
        assert narrow or sum(medium.frames for medium in media) >= 8
        return
    assert place.tokens <= shape.length
    assert place.vision_tokens <= min(shape.vision_tokens, place.tokens)
    assert all(size <= config.max_frame_patches for size, _ in place.frames)
    assert assign_frames(place.frames, [shape.patches] * vision_rows) is not None
    assert place.shrunk == (place.budget < config.processor.max_tokens)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), max_size=6), st.integers(1, 3), st.integers(1, 20))
def test_frames_are_placed_as_pack_places_them(frames, rows, patches):
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


def test_several_vision_rows_keep_their_plan(examples, folder):
    """Where a sample fails or loses frames, blank ones keep those behind it in place."""
    place = SampleSize(10, 8, 24, ((4, 4), (8, 1)), 100)
    sample = placeholder_sample(place, 2)
    assert [(v.patches_per_frame, v.grid[0], v.num_tokens) for v in sample.visuals] == [(4, 4, 0), (8, 1, 0)]
    assert placeholder_sample(place, 1).visuals == () or placeholder_sample(place, 1).visuals == []
    shape = dataclasses.replace(SETTINGS.shape, vision_rows=2, patches=512)
    rows = SampleBuilder(TOKENIZER, dataclasses.replace(SETTINGS, shape=shape))
    stream = good_records(5)[4] | {"video": ["v2.mp4"], "end_time": 4.0}
    _, place, sample = made(rows, folder, stream)
    planned = dataclasses.replace(place, frames=tuple((size, count + 2) for size, count in place.frames), patches=9999)
    more = rows.sample(record(**stream), MediaResolver(str(folder)), planned, SEED)
    assert sum(visual.grid[0] for visual in more.visuals) == planned.frames[0][1]
    np.testing.assert_array_equal(more.tokens, sample.tokens)
