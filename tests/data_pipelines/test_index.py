"""Tests that an index is correct, independent of how it was built, resumable, and bound to settings and content."""

import dataclasses
import os
import pathlib
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import psutil
import pytest
from sample_datasets import SETTINGS, TOKENIZER, bad_records, good_records, turns, write_lines

from data_pipelines import sample_errors
from data_pipelines.index import Index, build_index, find_index
from data_pipelines.parallel_map import WorkerDiedError
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import open_source
from data_pipelines.sources.media_resolver import MediaResolver
from support.full_disk import files_of_at_most
from vl3_jax.errors import InputError


@pytest.fixture(scope="module")
def folder(folder):
    write_lines(folder / "a.jsonl", [*good_records(20), *bad_records(folder), *good_records(5)])
    return folder


@pytest.fixture(scope="module")
def sample_builder():
    return SampleBuilder(TOKENIZER, SETTINGS)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("data_pipelines.index.CHUNK", 6)
    monkeypatch.setattr("data_pipelines.index.CHUNK_KEPT", 6)


def contents(index):
    return {path.name: path.read_bytes() for path in sorted(index.folder.iterdir())}


@pytest.mark.parametrize("kept", [False, True])
def test_an_index_holds_the_lengths_of_its_samples(folder, sample_builder, tmp_path, kept):
    source, media = open_source(str(folder / "a.jsonl")), MediaResolver(str(folder))
    progress = []
    index = build_index(source, media, sample_builder, tmp_path, kept, on_progress=lambda *done: progress.append(done))
    assert progress == [(n, 35) for n in (0, 6, 12, 18, 24, 30, 35)]
    index = pickle.loads(pickle.dumps(index))
    expected = [sample_builder.measure(source[n], media, kept) for n in range(len(source))]
    good = [not isinstance(lengths, SampleError) for lengths in expected]
    assert index.good.tolist() == good
    for number, (lengths, streamed) in enumerate(zip(expected, index, strict=True)):
        if good[number]:
            assert index[number] == streamed == lengths[0]
    assert index.errors() == [lengths for lengths in expected if isinstance(lengths, SampleError)]
    assert (len(index), len(index.errors())) == (35, good.count(False))
    assert sorted(os.listdir(tmp_path)) == sorted(["digests.json", index.folder.name])


def test_workers_and_resumption_change_nothing(folder, sample_builder, tmp_path):
    source, media = open_source(str(folder / "a.jsonl")), MediaResolver(str(folder))
    whole = contents(build_index(source, media, sample_builder, tmp_path / "one"))
    assert contents(build_index(source, media, sample_builder, tmp_path / "two", workers=2)) == whole

    class StoppedError(Exception):
        pass

    def stop(done, total):
        if done >= 18:
            raise StoppedError

    with pytest.raises(StoppedError):
        build_index(source, media, sample_builder, tmp_path / "three", on_progress=stop)
    starts = []
    again = build_index(
        source, media, sample_builder, tmp_path / "three", on_progress=lambda done, _: starts.append(done)
    )
    assert starts[0] == 18
    assert contents(again) == whole
    build_index(source, media, sample_builder, tmp_path / "three", on_progress=lambda done, _: starts.append(done))
    assert starts[-1] == 35
    assert starts.count(35) == 2


def test_an_index_belongs_to_its_settings_and_content(folder, sample_builder, tmp_path):
    media = MediaResolver(str(folder))

    def built(builder=sample_builder, path=folder / "a.jsonl", kept=False):
        return build_index(open_source(str(path)), media, builder, tmp_path / "index", kept).folder.name

    def changed(**values):
        return SampleBuilder(TOKENIZER, dataclasses.replace(SETTINGS, **values))

    first = built()
    assert built() == first
    assert built(changed(shape=dataclasses.replace(SETTINGS.shape, length=600))) == first  # only packing depends on it
    faster = changed(processor=dataclasses.replace(SETTINGS.processor, fps=2.0))
    larger = changed(processor=dataclasses.replace(SETTINGS.processor, max_tokens=64))
    other = write_lines(tmp_path / "a.jsonl", good_records(20))
    names = [first, built(kept=True), built(faster), built(path=other), built(larger, kept=True)]
    assert built(larger) == first
    assert len(set(names)) == len(names)
    (tmp_path / "elsewhere").mkdir()
    assert built(path=shutil.copy(folder / "a.jsonl", tmp_path / "elsewhere")) == first


def test_a_damaged_index_is_named(folder, sample_builder, tmp_path):
    index = build_index(open_source(str(folder / "a.jsonl")), MediaResolver(str(folder)), sample_builder, tmp_path)
    (index.folder / "media.npy").write_bytes(b"")
    with pytest.raises(InputError, match="index again"):
        Index(index.folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="choose a folder"):
        build_index(open_source(str(folder / "a.jsonl")), MediaResolver(), sample_builder, tmp_path / "file" / "x")


def test_a_killed_worker_is_an_error_and_finished_parts_are_kept(folder, sample_builder, tmp_path):
    write_lines(tmp_path / "long.jsonl", good_records(3000))
    source = open_source(str(tmp_path / "long.jsonl"))

    def kill():
        while True:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()) and list(tmp_path.glob("index/*.parts/*.npz")):
                    child.send_signal(signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerDiedError, match="resume where they stopped"):
        build_index(source, MediaResolver(str(folder)), sample_builder, tmp_path / "index", workers=2)
    killer.join()
    (parts,) = pathlib.Path(tmp_path / "index").glob("*.parts")
    assert list(parts.glob("*.npz"))


def test_late_starts_and_rotated_videos(sample_builder, tmp_path):
    """The number of frames comes from packets alone and equals that of decoding."""
    from support.media import all_media

    paths = [p for p in all_media() if p.parent.name != "images" and p.name != "bunny_long.mp4"]
    records = [{"video": [str(path)], "conversations": turns("Q", "A")} for path in paths]
    source = open_source(write_lines(tmp_path / "a.jsonl", records))
    index = build_index(source, MediaResolver(), sample_builder, tmp_path / "index")
    bad = {pathlib.Path(error.file).name: error.kind for error in index.errors()}
    assert bad == dict.fromkeys(["city_no_index.mp4", "city_truncated.mp4"], sample_errors.UNREADABLE)
    counts = {path.name: lengths.media[0].frames for path, lengths in zip(paths, index, strict=True) if lengths.media}
    assert counts["city_one_frame.mp4"] == 1
    assert counts["tree.avi"] == SETTINGS.processor.max_frames
    np.testing.assert_array_equal(index[[p.name for p in paths].index("city_rotated90.mp4")].media[0].height, 360)


def test_media_that_were_missing_or_not_allowed_are_tried_again(folder, sample_builder, tmp_path):
    source = open_source(str(folder / "a.jsonl"))
    full = build_index(source, MediaResolver(str(folder)), sample_builder, tmp_path / "right")

    def bad(media):
        return len(build_index(source, media, sample_builder, tmp_path / "index").errors())

    assert bad(MediaResolver(str(tmp_path / "wrong"))) > len(full.errors())
    assert bad(MediaResolver(str(folder))) == len(full.errors())
    assert find_index(source, sample_builder, tmp_path / "index", [False]).is_stale(MediaResolver(str(folder), True))


def test_a_full_disk_is_one_line_and_the_index_is_resumed(folder, sample_builder, tmp_path):
    source, media = open_source(str(folder / "a.jsonl")), MediaResolver(str(folder))
    with files_of_at_most(500), pytest.raises(InputError, match="no space left on the disk"):
        build_index(source, media, sample_builder, tmp_path)
    assert len(build_index(source, media, sample_builder, tmp_path)) == len(source)
