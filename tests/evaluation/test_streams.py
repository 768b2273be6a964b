"""Streams: what is shown is what training shows, decisions follow the likelier token, words become history."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data_pipelines.lengths import compute_sample_size
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.settings import DataSettings
from data_pipelines.synthetic.registry import example
from data_pipelines.synthetic.source import SyntheticSource
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator, Reply
from vl3_jax.evaluation.live_streams import run_streams
from vl3_jax.evaluation.nano_tasks import media_part
from vl3_jax.evaluation.tasks import QuestionSelection, find
from vl3_jax.inference.engine import DecodeOutput
from vl3_jax.model import decode, unembed
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.processing.tokenizer import IM_START, STREAM_START

SEED = 7


class Scripted(BatchGenerator):
    """Says what it is told to after each frame, stream by stream; `asked` holds every prompt."""

    def __init__(self, assistant, scripts):
        super().__init__(assistant)
        self.scripts, self.asked = scripts, []
        self.frames = [0] * len(scripts)

    def decide(self, samples, choices, bucket_sizes=()):
        self.asked += [sample.tokens.tolist() for sample in samples]
        self.now = [sum(one.grid[0] for one in sample.visuals) - 1 for sample in samples]
        speaks = [self._word(sample) is not None for sample in samples]
        return np.array([[0.0, -1.0] if speak else [-1.0, 0.0] for speak in speaks])

    def answer(self, samples, max_new_tokens, bucket_sizes=()):
        return [Reply(self._word(sample), 2, "stop") for sample in samples]

    def _word(self, sample):
        frame = sample.visuals[0].grid[0] - 1
        script = next(words for first, words in self.scripts if np.array_equal(first, sample.visuals[0].patches[:4]))
        return script[frame]


def streams_of(count):
    drawn = [example("stream", "test", SEED, number) for number in range(count)]
    return drawn, [([media_part(one.clip)], one.question) for one in drawn]


def scripted(assistant, drawn, streams, silent=False):
    first = [BatchGenerator(assistant).process(media, None).sample.visuals[0].patches[:4] for media, _ in streams]
    words = [[None] * one.clip.frames if silent else one.truth["words"] for one in drawn]
    return Scripted(assistant, list(zip(first, words, strict=True)))


def test_a_stream_of_true_words_is_the_one_that_training_shows(assistant):
    drawn, streams = streams_of(4)
    watched = run_streams(scripted(assistant, drawn, streams), streams, 8)
    config = assistant.processor.config
    settings = DataSettings(BatchShape(length=1024, patches=1024, vision_tokens=1024), config)
    reader, source = SampleBuilder(TOKENIZER, settings), SyntheticSource(f"synthetic://test/stream?count=4&seed={SEED}")
    for number, stream in enumerate(watched):
        record, media = source[number], MediaResolver("")
        trained = reader.sample(record, media, compute_sample_size(reader.lengths(record, media), settings), (0, 0))
        assert stream.tokens == trained.tokens.tolist()
        assert stream.is_vision == trained.is_vision.tolist()
        assert np.array_equal(stream.visual.keep, trained.visuals[0].keep)
        assert stream.words == drawn[number].truth["words"]


def test_each_frame_is_decided_with_the_frames_and_words_before_it(assistant):
    drawn, streams = streams_of(2)
    answerer = scripted(assistant, drawn, streams)
    watched = run_streams(answerer, streams, 8)
    assert len(answerer.asked) == sum(one.frames for one in watched)
    ends = {tuple(stream.tokens) for stream in watched}
    for prompt in answerer.asked:
        assert any(tuple(prompt) == end[: len(prompt)] for end in ends)


def test_a_silent_model_says_nothing(assistant):
    drawn, streams = streams_of(2)
    watched = run_streams(scripted(assistant, drawn, streams, silent=True), streams, 8)
    assert [one.words for one in watched] == [[None] * one.clip.frames for one in drawn]
    assert all(one.new_tokens == 0 for one in watched)


def test_the_real_model_is_asked_about_every_frame(assistant):
    (task,) = find(["nano/stream"])
    questions = task.questions(QuestionSelection(count=2))
    watched = run_streams(
        BatchGenerator(assistant, 4), [(one.media(), one.text) for one in questions], 2, task.bucket_sizes
    )
    for stream, question in zip(watched, questions, strict=True):
        assert len(stream.words) == len(question.truth["words"])
        assert all(word is None or isinstance(word, str) for word in stream.words)
    assert "score" in task.evaluate([one.words for one in watched], [one.truth for one in questions])


def test_decisions_are_the_log_probabilities_of_the_next_token(assistant):
    answerer = BatchGenerator(assistant, 1)
    sample = answerer.process([], "What is 1 + 2?").sample
    model, params = assistant.engine.model, assistant.engine.params
    batch = pack([[sample]], BatchShape(64, 0, 0, samples=1))
    text = [batch[name] for name in ("vision_slot", "segment_ids", "positions")]
    hidden, _ = decode(model, params, batch["tokens"], None, *text)
    expected = np.asarray(jax.nn.log_softmax(unembed(model, params, hidden[:, len(sample.tokens) - 1])))[0]
    order = np.argsort(-expected)
    choices = [int(order[rank]) for rank in (1, 0, 40, 500)]
    (found,) = answerer.decide([sample], choices)
    np.testing.assert_allclose(found, [*expected[choices[:3]], -np.inf], atol=1e-4)


def test_the_likelier_of_the_two_tokens_decides(assistant):
    answerer = BatchGenerator(assistant, 2)
    speak, wait = (assistant.processor.tokenizer.id_of(name) for name in (IM_START, STREAM_START))
    # Best tokens of three samples: a third token and then one of the two; neither of them.
    ids = np.array([[[5, speak, wait]], [[wait, 5, 6]], [[5, 6, 7]]])
    values = np.array([[[-0.1, -2.0, -3.0]], [[-0.1, -2.0, -3.0]], [[-0.1, -2.0, -3.0]]], np.float32)
    rows = iter([slice(0, 2), slice(2, 3)])

    def generate(samples, sampling):
        here = next(rows)
        tokens = np.zeros((len(samples), 1), int)
        padded = [np.concatenate([array[here]] * 2)[: len(samples)] for array in (ids, values)]
        yield DecodeOutput(tokens, np.ones((len(samples), 1), bool), *padded)

    answerer._engine = SimpleNamespace(generate=generate, model=assistant.engine.model)
    sample = answerer.process([], "Q").sample
    found = answerer.decide([sample] * 3, [speak, wait])
    np.testing.assert_allclose(found, [[-2, -3], [-np.inf, -0.1], [-np.inf, -np.inf]], rtol=1e-6)
    assert (found[:, 0] > found[:, 1]).tolist() == [True, False, False]


def test_what_is_no_stream_is_refused(assistant):
    pixels = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(InputError, match="exactly one"):
        run_streams(BatchGenerator(assistant), [([{"type": "image", "image": pixels}], "Watch.")], 2)
