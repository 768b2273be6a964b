"""The pictures of what the model sees: their names, their pixels, and the folders that are refused."""

import errno
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.media import MEDIA, TOKENIZER, numbered_frame, read_number, write_video
from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import Visual
from vl3_jax.processing.patchify import patchify
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.resize import resize_image
from vl3_jax.processing.saved_frames import frames_of, save_frames

IMAGE = MEDIA / "images" / "handwriting.png"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Six seconds of numbered frames, whose left half changes once a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, range(0, 6000, 100), codec="h264", crf=0, pixels="yuv444p")
    return str(path)


def process(*parts, **settings):
    return Processor.from_folder(TOKENIZER, **settings)([{"role": "user", "content": [*parts, "Q"]}])


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def names(folder: pathlib.Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@given(merge=st.sampled_from([1, 2]), grid=st.tuples(*[st.integers(1, 3)] * 3), seed=st.integers(0, 9))
def test_frames_are_joined_as_they_were_cut(merge, grid, seed):
    rng = np.random.default_rng(seed)
    count, rows, columns = grid[0], grid[1] * merge, grid[2] * merge
    frames = rng.integers(0, 256, (count, rows * 14, columns * 14, 3), np.uint8)
    keep = rng.random(count * grid[1] * grid[2]) < 0.5
    visual = Visual(patchify(frames, merge), (count, rows, columns), merge, keep)
    assert np.array_equal(list(frames_of(visual)), frames)
    side = 14 * merge
    blocks = keep.reshape(grid).repeat(side, axis=1).repeat(side, axis=2)[..., None]
    dimmed = np.array(list(frames_of(visual, dim_pruned=True)))
    assert np.array_equal(dimmed, np.where(blocks, frames, frames * 0.3 + 49).astype(np.uint8))


@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_every_kind_of_media(clip, tmp_path, preprocess):
    frames = np.stack([numbered_frame(number, 56, 84) for number in range(7)])
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    processed = process(
        {"type": "image", "image": str(IMAGE)},
        {"type": "video", "video": clip, "fps": 2},
        {"type": "image", "image": frames[5]},
        {"type": "video", "video": str(folder)},
        {"type": "video", "video": list(frames[:2])},
        {"type": "video", "video": frames[2:4], "timestamps": [0.5, 12]},
        preprocess=preprocess,
    )
    paths = processed.save_frames(tmp_path / "new" / "pictures")
    assert paths == [str(tmp_path / "new" / "pictures" / pathlib.Path(path).name) for path in paths]
    stems = [pathlib.Path(path).stem for path in paths]
    first, second = ([f"{n:04}_{time:.2f}" for n, time in enumerate(v.timestamps)] for v in processed.videos[:2])
    expected = ["00", *(f"01_{name}" for name in first), "02", *(f"03_{name}" for name in second)]
    assert stems == [*expected, "04_0000", "04_0001", "05_0000_0.50", "05_0001_12.00"]
    shown = [read_number(pixels(path)) for path in paths[1:]]
    assert shown == [*processed.videos[0].indices, 5, *processed.videos[1].indices, 0, 1, 2, 3]
    picture = pixels(paths[0])
    whole = resize_image(Image.open(IMAGE).convert("RGB"), picture.shape[:2])
    assert np.array_equal(picture, np.asarray(whole))


@pytest.mark.parametrize("preprocess", ["official", "native"])
def test_pruned_blocks_are_dimmed_in_a_second_picture(clip, tmp_path, preprocess):
    video = {"type": "video", "video": clip, "fps": 10, "max_frames": 12, "start": 1, "end": 2}
    processed = process(video, {"type": "image", "image": str(IMAGE)}, preprocess=preprocess)
    paths = processed.save_frames(tmp_path)
    kept = [path.replace(".png", "_kept.png") for path in paths[:-1]]
    assert names(tmp_path) == sorted(pathlib.Path(path).name for path in [*paths, *kept])
    dimmed_blocks = 0
    for path, kept_path in zip(paths, kept, strict=False):
        same = (pixels(path) == pixels(kept_path)).all(axis=-1)
        blocks = same.reshape(same.shape[0] // 28, 28, same.shape[1] // 28, 28).mean(axis=(1, 3))
        assert set(np.unique(blocks)) <= {0, 1}
        dimmed_blocks += int((blocks == 0).sum())
    assert dimmed_blocks == processed.visual_tokens_before_pruning - processed.visual_tokens > 0


def test_nothing_is_dimmed_without_pruning(clip, tmp_path):
    paths = process({"type": "video", "video": clip}, prune_threshold=None).save_frames(tmp_path)
    assert names(tmp_path) == sorted(pathlib.Path(path).name for path in paths)


def test_pictures_show_the_patches(clip, tmp_path):
    processed = process({"type": "video", "video": clip})
    processed.sample.visuals[0].patches[:] = 77
    for path in processed.save_frames(tmp_path):
        assert (pixels(path) == 77).all()


def test_a_conversation_of_text_gives_no_picture(tmp_path):
    assert process().save_frames(tmp_path) == []


FOLDERS = {
    "holds other files": "full",
    "is a file": "full/notes.txt",
    "cannot be written": "full/notes.txt/frames",
    "is a URL": "gs://bucket/frames",
    "File name too long": "a" * 300,
}


@pytest.mark.parametrize("reason", FOLDERS)
def test_unusable_folders_are_one_line(tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=reason) as error:
        save_frames([], [], FOLDERS[reason])
    assert FOLDERS[reason] in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert names(tmp_path) == ["full"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def no_space(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", no_space)
    with pytest.raises(InputError, match=r"00\.png: cannot be written \(No space left"):
        process({"type": "image", "image": str(IMAGE)}).save_frames(tmp_path)


def test_the_home_folder_has_a_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (path,) = process({"type": "image", "image": str(IMAGE)}).save_frames("~/frames")
    assert pathlib.Path(path) == tmp_path / "frames" / "00.png"
