"""Synthetic samples pass through the builders, the processor and the loader, from files and from memory."""

import json
import pickle

import numpy as np
import pytest

from data_pipelines.index import build_index
from data_pipelines.loader import Loader
from data_pipelines.mixture_dataset import DatasetSpec, IndexedDataset, MixtureDataset, open_mixture
from data_pipelines.packing.lengths import compute_sample_size
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import Record, open_source
from data_pipelines.sources.media_resolver import MediaResolver
from data_pipelines.synthetic.__main__ import main
from data_pipelines.synthetic.dataset_writer import write
from data_pipelines.synthetic.encoding import encode_image, encode_video
from data_pipelines.synthetic.registry import EVALUATED_TASKS, TASKS, examples
from data_pipelines.synthetic.source import SyntheticSource, SyntheticSpec, parse_url
from data_pipelines.synthetic.stages import shares, sources
from vl3_jax.errors import InputError
from vl3_jax.processing import images, videos
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.tokenizer import IM_END, IM_START, STREAM_START
from vl3_jax.storage.file_digests import FileDigests

PER_TASK = 4


def sample_of(builder, record, media=MediaResolver()):  # noqa: B008
    return builder.sample(
        record, media, compute_sample_size(builder.measure(record, media)[0], builder.settings), (0, 0)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data sets of all tasks."""
    folder = tmp_path_factory.mktemp("written")
    write(folder, "test", dict.fromkeys(TASKS, PER_TASK), seed=7)
    return folder


def test_files_are_lossless():
    rng = np.random.default_rng(0)
    for height, width in [(56, 84), (61, 77)]:
        frames = rng.integers(0, 256, (5, height, width, 3), np.uint8)
        assert np.array_equal(np.asarray(images.open_image(encode_image(frames[0])).load()), frames[0])
        for codec in ("qtrle", "rawvideo"):
            video = videos.open_video(encode_video(frames, codec))
            assert video.indices == list(range(5))
            assert video.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0]
            assert np.array_equal(np.stack([np.asarray(frame) for frame in video.frames()]), frames)


@pytest.mark.parametrize("task", TASKS)
def test_disk_and_memory_give_the_same_samples(task, folder, builder):
    written = open_source(str(folder / task / "annotations.jsonl"))
    generated = SyntheticSource(f"synthetic://test/{task}?seed=7&count={PER_TASK}")
    assert len(written) == len(generated) == PER_TASK
    for number in range(PER_TASK):
        from_memory, from_disk = (
            sample_of(builder, source[number], media)
            for source, media in ((generated, MediaResolver()), (written, MediaResolver(str(folder / task))))
        )
        assert not isinstance(from_memory, SampleError)
        for name in ("tokens", "is_vision", "loss_weight"):
            np.testing.assert_array_equal(getattr(from_memory, name), getattr(from_disk, name))
        for visual, other in zip(from_memory.visuals, from_disk.visuals, strict=True):
            np.testing.assert_array_equal(visual.patches, other.patches)
            np.testing.assert_array_equal(visual.keep, other.keep)


def test_the_answers_are_supervised(builder):
    for task in TASKS:
        for example in examples(task, "train", 0, PER_TASK):
            if example.utterances:
                continue
            fields = example.record([medium.pixels() for medium in example.media], task)
            if example.video:
                fields["timestamps"] = example.video.times
            sample = sample_of(builder, Record(fields, "test"))
            supervised = sample.tokens[sample.loss_weight > 0].tolist()
            text = builder.tokenizer.decode(supervised, skip_special_tokens=False)
            assert text == "".join(answer + IM_END for _, answer in example.turns)


def test_written_files_are_indexed_and_loaded(folder, builder):
    specs = [
        DatasetSpec(task, (str(folder / task / "annotations.jsonl"),), str(folder / task), task)
        for task in ("addition", "pair", "when", "stream")
    ]
    mixture = open_mixture(specs, builder, build=True)
    assert mixture.log().bad == 0
    with Loader(mixture, 1, threads=1) as loader:
        batches = list(loader)
    assert loader.log.bad == 0
    assert sorted(n for batch in batches for n in batch.samples.ravel().tolist() if n >= 0) == list(range(4 * PER_TASK))
    references = [
        json.loads(line)["reference"] for line in (folder / "when" / "annotations.jsonl").read_text().splitlines()
    ]
    assert references == [dict(example.reference) for example in examples("when", "test", 7, PER_TASK)]


def test_the_source_feeds_the_loader(tmp_path, builder):
    source = SyntheticSource("synthetic://train/stage4?count=120&seed=2")
    index = build_index(source.outline(), MediaResolver(), builder, tmp_path / "outline")
    full = build_index(source, MediaResolver(), builder, tmp_path / "full")
    assert index.good.all()
    for name in ("text", "offsets", "media"):
        np.testing.assert_array_equal(getattr(index, name), getattr(full, name))
    assert index.folder.name == full.folder.name  # equal fingerprints: either index serves both
    mixture = MixtureDataset([IndexedDataset(DatasetSpec("nano", ("synthetic",)), source, index)], builder)
    with Loader(mixture, 1, threads=2) as loader:
        assert sum(int((batch.samples >= 0).sum()) for batch in loader) == 120
        assert loader.log.bad == 0


def test_a_pickled_source_gives_the_same_samples():
    source = SyntheticSource("synthetic://train/stage3?count=50&seed=2")
    unpickled = pickle.loads(pickle.dumps(source))
    assert unpickled.fingerprint(FileDigests()) == source.fingerprint(FileDigests())
    for number in (7, 3, 49):
        fields, other_fields = source[number].fields, unpickled[number].fields
        assert fields["reference"] == other_fields["reference"]
        for key in ("image", "video"):
            for medium, other in zip(fields.get(key, ()), other_fields.get(key, ()), strict=True):
                assert np.array_equal(medium, other)
    longer = SyntheticSource("synthetic://train/stage3?count=5000&seed=2")
    assert longer[7].fields["reference"] == source[7].fields["reference"]
    assert longer.fingerprint(FileDigests()) != source.fingerprint(FileDigests())
    with pytest.raises(IndexError):
        source[50]


def test_tasks_come_in_proportion():
    source = SyntheticSource("synthetic://train/digit,shape=3?count=1000")
    for start in (0, 600):
        tasks = [source.task_of(number) for number in range(start, start + 200)]
        assert abs(tasks.count("shape") - 150) <= 3
    assert parse_url(source.spec.url) == source.spec
    spec = SyntheticSpec("test", {"digit": 2.0}, 5, 1, "my images/a&b.npz")
    assert parse_url(spec.url) == spec


def test_the_sources_of_a_stage():
    opened = {task: SyntheticSource(path) for task, path in sources(2, 10_000, seed=5).items()}
    assert abs(sum(map(len, opened.values())) - 10_000) < 20
    assert len(opened["ocr"]) == round(10_000 * shares(2)["ocr"])
    assert all(source.task_of(3) == task for task, source in opened.items())
    assert opened["digit"].spec.seed == 5


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("synthetic://train", "give synthetic data as"),
        ("synthetic://train/nothing", "task 'nothing' is unknown"),
        ("synthetic://train/stage9", "task 'stage9' is unknown"),
        ("synthetic://train/digit?cont=3", "unknown setting 'cont'"),
        ("synthetic://train/digit?count=many", "are numbers"),
        ("synthetic://train/digit=x", "are numbers"),
        ("synthetic://train/digit=-1", "above 0"),
        ("synthetic://train/digit?count=0", "1 or more"),
        ("synthetic://training/digit", "split 'training' is unknown"),
        ("synthetic://test/digit?images=gone.npz", "no such file"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises(InputError, match=message):
        SyntheticSource(url)


@pytest.mark.parametrize("min_tokens", [4, 16])
def test_static_videos_can_be_pruned(builder, min_tokens):
    """The default threshold prunes at least half of each video."""
    from vl3_jax.processing.processor_config import ProcessorConfig

    processor = Processor(builder.tokenizer, ProcessorConfig(min_tokens=min_tokens, threads=1))
    for split in ("train", "test"):
        for example in examples("static", split, 0, 25):
            content = {"type": "video", "video": example.video.pixels(), "timestamps": example.video.times}
            processed = processor([{"role": "user", "content": [content]}])
            assert processed.visual_tokens <= 0.5 * processed.visual_tokens_before_pruning


def test_streams_teach_when_to_speak(builder):
    """Supervised decisions and words are those of the reference, with as many decisions to speak as to wait."""
    tokenizer = builder.tokenizer
    starts = {tokenizer.id_of(IM_START): True, tokenizer.id_of(STREAM_START): False}
    source = SyntheticSource("synthetic://train/stream?count=30")
    for number in range(30):
        words = source.example(number).reference["words"]
        sample = sample_of(builder, source[number])
        frame, decisions, previous_was_frame = -1, [], False
        for token, weight in zip(sample.tokens.tolist(), sample.loss_weight.tolist(), strict=True):
            if token not in starts:
                continue
            if weight:
                assert previous_was_frame
                assert starts[token] == (words[frame] is not None)
                decisions.append(starts[token])
            elif frame < 0 and not starts[token]:
                assert sample.tokens[0] == tokenizer.id_of(IM_START)  # the request comes before the first frame
            frame += not starts[token]
            previous_was_frame = not starts[token]
        assert frame + 1 == len(words)
        speaks = len(words) - words.count(None)
        waits = words[:-1].count(None)
        assert (decisions.count(True), decisions.count(False)) in {(min(speaks, waits),) * 2, (speaks, waits)}
        supervised = tokenizer.decode(sample.tokens[(sample.loss_weight > 0)].tolist())
        assert supervised == "".join(word for word in words if word)


def test_streams_are_mostly_silent():
    words = [word for example in examples("stream", "test", 0, 200) for word in example.reference["words"]]
    assert 0.28 < sum(word is not None for word in words) / len(words) < 0.45


def test_command(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--count", "2", "--seed", "1", "--tasks", "digit,motion"]
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digit", "motion"]
    before = (tmp_path / "motion" / "media" / "000001.mov").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "motion" / "media" / "000001.mov").read_bytes() == before
    capsys.readouterr()
    for bad in (["--tasks", "nothing"], ["--count", "0"], ["--images", "gone.npz"], ["--seed", "-1"]):
        assert main(["--out", str(tmp_path / "other"), *bad]) == 2
        assert capsys.readouterr().err.splitlines()[-1].strip()
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file"), "--tasks", "digit", "--count", "1"]) == 2
    assert set(EVALUATED_TASKS) <= set(TASKS)
