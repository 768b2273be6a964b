"""Through the project's own readers, processor and loader, from files and from memory."""

import json
import pickle

import numpy as np
import pytest

from data_pipelines.annotations import to_conversation
from data_pipelines.indexing import build_index
from data_pipelines.lengths import compute_sample_size
from data_pipelines.loader import Loader
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.mixture_dataset import DatasetSpec, IndexedDataset, MixtureDataset, open_mixture
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import open_source
from data_pipelines.synthetic.__main__ import main
from data_pipelines.synthetic.dataset_writer import write
from data_pipelines.synthetic.encoding import encode_image, encode_video
from data_pipelines.synthetic.registry import JUDGED, TASKS, examples
from data_pipelines.synthetic.source import Request, SyntheticSource, parse
from data_pipelines.synthetic.stages import shares, sources
from vl3_jax.errors import InputError
from vl3_jax.processing import images, videos
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.tokenizer import IM_END, IM_START, STREAM_START

PER_TASK = 4


def sample_of(reader, record, media=MediaResolver()):  # noqa: B008
    return reader.sample(record, media, compute_sample_size(reader.lengths(record, media), reader.settings), (0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All tasks on disk."""
    folder = tmp_path_factory.mktemp("written")
    write(folder, "test", dict.fromkeys(TASKS, PER_TASK), seed=7)
    return folder


def test_files_are_lossless():
    rng = np.random.default_rng(0)
    for height, width in [(56, 84), (61, 77)]:
        frames = rng.integers(0, 256, (5, height, width, 3), np.uint8)
        assert np.array_equal(np.asarray(images.open_image(encode_image(frames[0])).load()), frames[0])
        for codec in ("qtrle", "rawvideo"):
            clip = videos.open_video(encode_video(frames, codec))
            assert clip.indices == list(range(5))
            assert clip.timestamps == [0.0, 1.0, 2.0, 3.0, 4.0]
            assert np.array_equal(np.stack([np.asarray(frame) for frame in clip.frames()]), frames)


@pytest.mark.parametrize("task", TASKS)
def test_disk_and_memory_give_the_same_samples(task, folder, reader):
    written = open_source(str(folder / task / "annotations.jsonl"))
    drawn = SyntheticSource(f"synthetic://test/{task}?seed=7&count={PER_TASK}")
    assert len(written) == len(drawn) == PER_TASK
    for number in range(PER_TASK):
        here, there = (
            sample_of(reader, source[number], media)
            for source, media in ((drawn, MediaResolver()), (written, MediaResolver(str(folder / task))))
        )
        assert not isinstance(here, SampleError)
        for name in ("tokens", "is_vision", "loss_weight"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
        for one, other in zip(here.visuals, there.visuals, strict=True):
            np.testing.assert_array_equal(one.patches, other.patches)
            np.testing.assert_array_equal(one.keep, other.keep)


def test_what_is_learned_is_the_answer(reader):
    for task in TASKS:
        for one in examples(task, "train", 0, PER_TASK):
            if one.said:
                continue
            fields = one.record([medium.pixels() for medium in one.media], task)
            if one.clip:
                fields["timestamps"] = one.clip.times
            processed = Processor(reader.tokenizer, reader.settings.processor)(
                to_conversation(fields, "here", MediaResolver()).messages, add_generation_prompt=False, supervise=True
            )
            learned = processed.sample.tokens[processed.sample.loss_weight > 0].tolist()
            text = reader.tokenizer.decode(learned, skip_special_tokens=False)
            assert text == "".join(answer + IM_END for _, answer in one.turns)


def test_written_files_are_indexed_and_loaded(folder, reader):
    specs = [
        DatasetSpec(task, (str(folder / task / "annotations.jsonl"),), str(folder / task), task)
        for task in ("addition", "pair", "when", "stream")
    ]
    mixture = open_mixture(specs, reader, build=True)
    assert mixture.log().bad == 0
    with Loader(mixture, 1, threads=1) as loader:
        batches = list(loader)
    assert loader.log.bad == 0
    assert sorted(n for batch in batches for n in batch.samples.ravel().tolist() if n >= 0) == list(range(4 * PER_TASK))
    truths = [json.loads(line)["truth"] for line in (folder / "when" / "annotations.jsonl").read_text().splitlines()]
    assert truths == [dict(one.truth) for one in examples("when", "test", 7, PER_TASK)]


def test_the_source_feeds_the_loader(tmp_path, reader):
    source = SyntheticSource("synthetic://train/stage4?count=120&seed=2")
    index = build_index(source.outline(), MediaResolver(), reader, tmp_path / "outline")
    drawn = build_index(source, MediaResolver(), reader, tmp_path / "drawn")
    assert index.good.all()
    for name in ("text", "offsets", "media"):
        np.testing.assert_array_equal(getattr(index, name), getattr(drawn, name))
    assert index.folder.name == drawn.folder.name  # one is found where the other is looked for
    mixture = MixtureDataset([IndexedDataset(DatasetSpec("nano", ("synthetic",)), source, index)], reader)
    with Loader(mixture, 1, threads=2) as loader:
        assert sum(int((batch.samples >= 0).sum()) for batch in loader) == 120
        assert loader.log.bad == 0


def test_a_source_travels_and_repeats():
    source = SyntheticSource("synthetic://train/stage3?count=50&seed=2")
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()
    for number in (7, 3, 49):
        here, there = source[number].fields, again[number].fields
        assert here["truth"] == there["truth"]
        for key in ("image", "video"):
            for one, other in zip(here.get(key, ()), there.get(key, ()), strict=True):
                assert np.array_equal(one, other)
    longer = SyntheticSource("synthetic://train/stage3?count=5000&seed=2")
    assert longer[7].fields["truth"] == source[7].fields["truth"]
    assert longer.fingerprint() != source.fingerprint()
    with pytest.raises(IndexError):
        source[50]


def test_tasks_come_in_proportion():
    source = SyntheticSource("synthetic://train/digit,shape=3?count=1000")
    for start in (0, 600):
        drawn = [source.task_of(number) for number in range(start, start + 200)]
        assert abs(drawn.count("shape") - 150) <= 3
    assert parse(source.request.path) == source.request
    mine = Request("test", {"digit": 2.0}, 5, 1, "my pictures/a&b.npz")
    assert parse(mine.path) == mine


def test_the_sources_of_a_stage():
    opened = {task: SyntheticSource(path) for task, path in sources(2, 10_000, seed=5).items()}
    assert abs(sum(map(len, opened.values())) - 10_000) < 20
    assert len(opened["ocr"]) == round(10_000 * shares(2)["ocr"])
    assert all(source.task_of(3) == task for task, source in opened.items())
    assert opened["digit"].request.seed == 5


@pytest.mark.parametrize(
    ("path", "complaint"),
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
        ("synthetic://test/digit?pictures=gone.npz", "no such file"),
    ],
)
def test_bad_paths(path, complaint):
    with pytest.raises(InputError, match=complaint):
        SyntheticSource(path)


@pytest.mark.parametrize("min_tokens", [4, 16])
def test_static_clips_can_be_pruned(reader, min_tokens):
    """By half at least, each of them, at the default threshold."""
    from vl3_jax.processing.processor_config import ProcessorConfig

    processor = Processor(reader.tokenizer, ProcessorConfig(min_tokens=min_tokens, threads=1))
    for split in ("train", "test"):
        for one in examples("static", split, 0, 25):
            content = {"type": "video", "video": one.media[0].pixels(), "timestamps": one.clip.times}
            processed = processor([{"role": "user", "content": [content]}])
            assert processed.visual_tokens <= 0.5 * processed.visual_tokens_before_pruning


def test_streams_teach_when_to_speak(reader):
    """Every decision that is learned is the true one, as many of each kind; and so are the words."""
    tokenizer = reader.tokenizer
    starts = {tokenizer.id_of(IM_START): True, tokenizer.id_of(STREAM_START): False}
    source = SyntheticSource("synthetic://train/stream?count=30")
    for number in range(30):
        words = source.example(number).truth["words"]
        sample = sample_of(reader, source[number])
        frame, learned, previous_was_frame = -1, [], False
        for token, weight in zip(sample.tokens.tolist(), sample.loss_weight.tolist(), strict=True):
            if token not in starts:
                continue
            if weight:
                assert previous_was_frame
                assert starts[token] == (words[frame] is not None)
                learned.append(starts[token])
            elif frame < 0 and not starts[token]:
                assert sample.tokens[0] == tokenizer.id_of(IM_START)  # the request comes before the first frame
            frame += not starts[token]
            previous_was_frame = not starts[token]
        assert frame + 1 == len(words)
        speaks = len(words) - words.count(None)
        waits = words[:-1].count(None)
        assert (learned.count(True), learned.count(False)) in {(min(speaks, waits),) * 2, (speaks, waits)}
        supervised = tokenizer.decode(sample.tokens[(sample.loss_weight > 0)].tolist())
        assert supervised == "".join(word for word in words if word)


def test_streams_are_mostly_silent():
    words = [word for one in examples("stream", "test", 0, 200) for word in one.truth["words"]]
    assert 0.28 < sum(word is not None for word in words) / len(words) < 0.45


def test_command(tmp_path, capsys):
    given = ["--out", str(tmp_path), "--count", "2", "--seed", "1", "--tasks", "digit,motion"]
    assert main(given) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digit", "motion"]
    before = (tmp_path / "motion" / "media" / "000001.mov").read_bytes()
    assert main(given) == 0
    assert (tmp_path / "motion" / "media" / "000001.mov").read_bytes() == before
    capsys.readouterr()
    for bad in (["--tasks", "nothing"], ["--count", "0"], ["--pictures", "gone.npz"], ["--seed", "-1"]):
        assert main(["--out", str(tmp_path / "other"), *bad]) == 2
        assert capsys.readouterr().err.splitlines()[-1].strip()
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file"), "--tasks", "digit", "--count", "1"]) == 2
    assert set(JUDGED) <= set(TASKS)
