"""Tests of the processor, from a conversation to a sample: every media file, settings, damaged files, threads."""

import json

import numpy as np
import pytest
from PIL import Image

from support.media import MEDIA, TOKENIZER, all_media, write_video
from vl3_jax.errors import InputError
from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.messages import parse_messages
from vl3_jax.processing.patchify import normalise, patchify
from vl3_jax.processing.processor import Processor, open_media
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import Tokenizer

TREE, HANDWRITING = str(MEDIA / "videos/tree.avi"), str(MEDIA / "images/handwriting.png")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TOKENIZER)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def video(path, **options):
    return {"type": "video", "video": str(path), **options}


def image(source, **options):
    return {"type": "image", "image": source, **options}


@pytest.mark.parametrize("path", all_media(), ids=lambda path: path.name)
@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_every_file_is_processed_or_refused_by_name(tokenizer, path, preprocess):
    processor = Processor(tokenizer, ProcessorConfig(preprocess=preprocess))
    part = image(path) if path.parent.name == "images" else video(path)
    if path.name == "city_no_index.mp4":
        with pytest.raises(InputError, match=r"city_no_index\.mp4"):
            processor(user(part, "What is it?"))
        return
    processed = processor(user(part, "What is it?"))
    (visual,) = processed.sample.visuals
    assert processed.sample.is_vision.sum() == processed.visual_tokens == visual.num_tokens
    assert 16 <= processed.visual_tokens_before_pruning == len(visual.keep) <= 16_384
    assert set(processed.sample.tokens[processed.sample.is_vision]) == {151665}
    assert processed.sample.tokens.tolist()[-3:] == [151644, 77091, 198]
    assert bool(processed.warnings) == (path.name == "city_truncated.mp4")
    if part["type"] == "video":
        (frames,) = processed.videos
        assert len(frames.indices) == len(frames.timestamps) == visual.grid[0]
        (media,) = parse_messages(user(part))[0].media
        assert open_media(media, processor.config).name == str(path)


def test_text_without_media(tokenizer):
    processed = Processor(tokenizer)(user("Hi"), add_system_prompt=True)
    assert tokenizer.decode(processed.sample.tokens.tolist()).startswith("system\nYou are VideoLLaMA3")
    assert (processed.visual_tokens, processed.videos, processed.warnings) == (0, [], [])


def test_images_are_resized_by_pillow_bicubic_and_cut_in_block_order(tokenizer):
    for merge, size in ((1, (448, 168)), (2, (448, 168))):
        processed = Processor(tokenizer, ProcessorConfig(image_merge=merge))(user(image(HANDWRITING)))
        resized = Image.open(HANDWRITING).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(processed.sample.visuals[0].patches, patchify(np.asarray(resized)[None], merge))


def test_pruning_equals_that_of_normalised_pixels(tokenizer):
    processed = Processor(tokenizer)(user(video(TREE)))
    (visual,) = processed.sample.visuals
    pixels = normalise(visual.patches, (0.5,) * 3, (0.5,) * 3).reshape(visual.grid[0], -1, 4 * 588)
    np.testing.assert_array_equal(visual.keep, keep_mask(pixels).reshape(-1))
    assert processed.visual_tokens < processed.visual_tokens_before_pruning
    unpruned = Processor(tokenizer, ProcessorConfig(prune_threshold=None))(user(video(TREE)))
    assert unpruned.visual_tokens == processed.visual_tokens_before_pruning
    static = np.full((4, 60, 60, 3), 7, np.uint8)
    pruned = Processor(tokenizer, ProcessorConfig(prune_min_tokens=2))(user({"type": "video", "video": static}))
    assert pruned.visual_tokens == 16 + 3 * 2


def test_images_and_videos_share_the_budget(tokenizer):
    processor = Processor(tokenizer, ProcessorConfig(max_tokens=600))
    processed = processor(user(image(HANDWRITING), video(TREE, fps=0.5), "Compare."))
    assert processed.visual_tokens_before_pruning <= 600
    assert [visual.merge for visual in processed.sample.visuals] == [1, 2]
    assert len(processed.videos[0].indices) == 14


def test_options_of_a_video_override_the_settings(tokenizer):
    processor = Processor(tokenizer, ProcessorConfig(fps=1, max_frames=180))
    parts = [video(TREE, max_frames=4), video(TREE, start=5, end=9), video(TREE, fps=2.0, end=3)]
    assert [frames.timestamps for frames in processor(user(*parts)).videos] == [
        [0.0, 9.0, 18.0, 28.0],
        [5.0, 6.0, 7.0, 8.0],
        [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
    ]


def test_frames_with_and_without_times(tokenizer):
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)
    processor = Processor(tokenizer)
    timed = processor(user({"type": "video", "video": frames, "timestamps": [0, 2.5, 5]}, "Q"))
    assert "Time 0.0s:" in tokenizer.decode(timed.sample.tokens.tolist())
    assert "Time 2.5s:" in tokenizer.decode(timed.sample.tokens.tolist())
    plain = processor(user({"type": "video", "video": frames}, "Q"))
    assert "Time" not in tokenizer.decode(plain.sample.tokens.tolist())
    assert plain.videos[0].timestamps is None
    with pytest.raises(InputError, match="fps does not apply"):
        processor(user({"type": "video", "video": frames, "fps": 2}))


def test_supervision(tokenizer):
    conversation = [*user(image(HANDWRITING), "Q"), {"role": "assistant", "content": "A"}]
    processed = Processor(tokenizer)(conversation, add_generation_prompt=False, supervise=True)
    supervised = processed.sample.tokens[processed.sample.loss_weight > 0]
    assert supervised.tolist() == [*tokenizer.encode("A"), 151645]


def test_media_are_opened_without_decoding(tokenizer):
    conversation = user(video(TREE), image(HANDWRITING), "Q")
    config = ProcessorConfig(fps=0.5)
    tree, handwriting = (open_media(part, config) for part in parse_messages(conversation)[0].media)
    (frames,) = Processor(tokenizer, config)(conversation).videos
    assert (tree.num_frames, tree.timestamps, tree.indices) == (len(frames.indices), frames.timestamps, frames.indices)
    assert (handwriting.num_frames, handwriting.timestamps) == (1, None)
    pixels = handwriting.load()
    assert (handwriting.width, handwriting.height) == pixels.size


def test_a_thin_image_is_accepted_officially_and_refused_natively(tokenizer):
    thin = np.zeros((1, 5000, 3), np.uint8)
    assert Processor(tokenizer)(user(image(thin))).visual_tokens > 0
    with pytest.raises(InputError, match="5000 x 1 pixels"):
        Processor(tokenizer, ProcessorConfig(preprocess="native"))(user(image(thin)))


def test_a_tiny_image_beside_a_video(tokenizer):
    """With mixed merge sizes there is no minimum of tokens, but at least one block per side."""
    pixel = np.zeros((1, 1, 3), np.uint8)
    processed = Processor(tokenizer)(user(image(pixel), video(TREE)))
    assert processed.sample.visuals[0].grid == (1, 1, 1)


def test_frames_of_a_damaged_video_are_selected_again(tokenizer, tmp_path):
    import av

    path = tmp_path / "hole.mov"
    write_video(path, range(0, 5100, 100), codec="png", pixels="rgb24")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for start, size in packets[25:]:
        data[start : start + size] = bytes(size)
    path.write_bytes(data)
    processed = Processor(tokenizer)(user(video(path), image(HANDWRITING)))
    assert processed.videos[0].timestamps == [0.0, 1.0]
    assert processed.sample.visuals[0].grid[0] == 2
    assert "hole.mov: damaged; 25 frames" in processed.warnings[0]


def test_concurrent_calls_give_equal_results(tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    processor = Processor(tokenizer, ProcessorConfig(threads=1))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: processor(user(video(TREE), "Q")), range(6)))
    for result in results[1:]:
        np.testing.assert_array_equal(results[0].sample.visuals[0].patches, result.sample.visuals[0].patches)
        assert results[0].sample.tokens.tolist() == result.sample.tokens.tolist()


def write_json(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_settings_of_an_official_checkpoint(tmp_path):
    write_json(
        tmp_path,
        config={"model_type": "videollama3_qwen2", "use_token_compression": True},
        preprocessor_config={
            "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2] * 3,
            "min_tokens": 8,
            "max_tokens": 9000,
        },
        processor_config={"image_merge_size": 2, "video_merge_size": 2, "fps": 2, "max_frames": 128},
    )
    assert ProcessorConfig.from_folder(tmp_path, fps=4.0) == ProcessorConfig(
        image_merge=2,
        min_tokens=8,
        max_tokens=9000,
        fps=4.0,
        max_frames=128,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.2, 0.2),
    )


NATIVE_IMAGE = {"min_pixels": 3136, "max_pixels": 1_605_632, "merge_size": 1, "image_mean": [0.5] * 3}
NATIVE_VIDEO = {"merge_size": 2, "max_frames": 90, "fps": None, "use_token_compression": False}


def test_settings_of_a_native_checkpoint(tmp_path):
    expected = ProcessorConfig(max_tokens=8192, max_frames=90, prune_threshold=None, native_placeholders=True)
    config = {"model_type": "video_llama_3"}
    write_json(tmp_path, config=config, preprocessor_config=NATIVE_IMAGE, video_preprocessor_config=NATIVE_VIDEO)
    assert ProcessorConfig.from_folder(tmp_path) == expected
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "video_preprocessor_config.json").unlink()
    size = {"size": {"shortest_edge": 3136, "longest_edge": 1_605_632}, "merge_size": 1}
    write_json(tmp_path, processor_config={"image_processor": size, "video_processor": NATIVE_VIDEO})
    assert ProcessorConfig.from_folder(tmp_path) == expected


def test_settings_without_files(tmp_path):
    assert ProcessorConfig.from_folder(tmp_path) == ProcessorConfig()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"processor_config": {"image_merge_size": 3}}, "image_merge is 3; use one of 1, 2"),
        ({"preprocessor_config": []}, r"preprocessor_config\.json: holds \[\], and an object is expected"),
        ({"preprocessor_config": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"preprocessor_config": {"image_std": 0}}, "image_std"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as caught:
        ProcessorConfig.from_folder(write_json(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


def test_a_settings_file_that_is_not_json_is_refused_by_name(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json:1: not valid JSON"):
        ProcessorConfig.from_folder(tmp_path)


def test_processor_from_folder(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(TOKENIZER / "tokenizer.json")
    processor = Processor.from_folder(tmp_path, preprocess="native")
    assert processor.config.preprocess == "native"
    assert processor(user("Hi")).sample.tokens.tolist()[0] == 151644


def test_no_heavy_library_is_imported():
    import subprocess
    import sys

    heavy = ("torch", "transformers", "tensorflow", "flax", "jax")
    code = f"import sys, vl3_jax.processing.processor; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
