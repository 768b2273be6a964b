"""Streams: prompts equal training samples, the more likely token decides, and words become part of the prompt."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from data_pipelines.packing.lengths import compute_sample_size
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.settings import DataSettings
from data_pipelines.sources.media_resolver import MediaResolver
from data_pipelines.synthetic.registry import example
from data_pipelines.synthetic.source import SyntheticSource
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator, Reply
from vl3_jax.evaluation.live_streams import run_streams
from vl3_jax.evaluation.tasks import QuestionSelection, find, media_part
from vl3_jax.model import decode, unembed
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.processing.tokenizer import IM_START, STREAM_START

SEED = 7
pytestmark = pytest.mark.usefixtures("fast_compile")


class ScriptedGenerator(BatchGenerator):
    """Says the words of a script after each frame of each stream; `prompts` has every prompt."""

    def __init__(self, chat_model, scripts):
        super().__init__(chat_model)
        self.scripts, self.prompts = scripts, []

    def choice_logprobs(self, samples, choices):
        self.prompts += [sample.tokens.tolist() for sample in samples]
        speaks = [self._word(sample) is not None for sample in samples]
        return np.array([[0.0, -1.0] if speak else [-1.0, 0.0] for speak in speaks])

    def generate(self, samples, max_new_tokens):
        return [Reply(self._word(sample), 2, "stop") for sample in samples]

    def _word(self, sample):
        frame = sample.visuals[0].grid[0] - 1
        script = next(words for first, words in self.scripts if np.array_equal(first, sample.visuals[0].patches[:4]))
        return script[frame]


def streams_of(count):
    examples = [example("stream", "test", SEED, number) for number in range(count)]
    return examples, [([media_part(sample.video)], sample.question) for sample in examples]


def scripted(chat_model, examples, streams, silent=False):
    first = [BatchGenerator(chat_model).process(media, None).sample.visuals[0].patches[:4] for media, _ in streams]
    words = [[None] * sample.video.num_frames if silent else sample.reference["words"] for sample in examples]
    return ScriptedGenerator(chat_model, list(zip(first, words, strict=True)))


def test_a_stream_with_reference_words_equals_the_training_sample(chat_model):
    examples, streams = streams_of(4)
    states = run_streams(scripted(chat_model, examples, streams), streams, 8)
    config = chat_model.processor.config
    settings = DataSettings(BatchShape(length=1024, patches=1024, vision_tokens=1024), config)
    builder, source = (
        SampleBuilder(TOKENIZER, settings),
        SyntheticSource(f"synthetic://test/stream?count=4&seed={SEED}"),
    )
    for number, state in enumerate(states):
        record, media = source[number], MediaResolver("")
        trained = builder.sample(
            record, media, compute_sample_size(builder.measure(record, media)[0], settings), (0, 0)
        )
        assert state.tokens == trained.tokens.tolist()
        assert state.is_vision == trained.is_vision.tolist()
        assert np.array_equal(state.visual.keep, trained.visuals[0].keep)
        assert state.words == examples[number].reference["words"]


def test_each_frame_is_decided_with_the_frames_and_words_before_it(chat_model):
    examples, streams = streams_of(2)
    generator = scripted(chat_model, examples, streams)
    states = run_streams(generator, streams, 8)
    assert len(generator.prompts) == sum(state.num_frames for state in states)
    ends = {tuple(state.tokens) for state in states}
    for prompt in generator.prompts:
        assert any(tuple(prompt) == end[: len(prompt)] for end in ends)


def test_a_silent_model_says_nothing(chat_model):
    examples, streams = streams_of(2)
    states = run_streams(scripted(chat_model, examples, streams, silent=True), streams, 8)
    assert [state.words for state in states] == [[None] * sample.video.num_frames for sample in examples]
    assert all(state.new_tokens == 0 for state in states)


def test_a_real_model_decides_after_every_frame(chat_model):
    (task,) = find(["nano/stream"])
    questions = task.questions(QuestionSelection(count=2))
    states = run_streams(
        BatchGenerator(chat_model, 4),
        [(question.media(), question.text) for question in questions],
        2,
    )
    for state, question in zip(states, questions, strict=True):
        assert len(state.words) == len(question.reference["words"])
        assert all(word is None or isinstance(word, str) for word in state.words)
    assert "score" in task.evaluate([state.words for state in states], [question.reference for question in questions])


def test_decisions_are_the_log_probabilities_of_the_next_token(chat_model):
    generator = BatchGenerator(chat_model, 1)
    sample = generator.process([], "What is 1 + 2?").sample
    model, params = chat_model.engine.model, chat_model.engine.params
    batch = pack([[sample]], BatchShape(64, 0, 0, samples=1))
    text = [batch[name] for name in ("vision_slot", "segment_ids", "positions")]
    hidden, _ = decode(model, params, batch["tokens"], None, *text)
    expected = np.asarray(jax.nn.log_softmax(unembed(model, params, hidden[:, len(sample.tokens) - 1])))[0]
    order = np.argsort(-expected)
    choices = [int(order[rank]) for rank in (1, 0, 40, 500)]
    (logprobs,) = generator.choice_logprobs([sample], choices)
    np.testing.assert_allclose(logprobs, [*expected[choices[:3]], -np.inf], atol=1e-4)


def test_the_more_likely_of_the_two_tokens_decides(chat_model, monkeypatch):
    generator = BatchGenerator(chat_model, 2)
    speak, wait = (chat_model.processor.tokenizer.id_of(name) for name in (IM_START, STREAM_START))
    # The three most likely tokens of three samples: with both choices, with one of them, with none.
    likely = [[5, speak, wait], [wait, 5, 6], [5, 6, 7]]

    def run(requests):
        assert [request.sampling.max_new_tokens for request in requests] == [1, 1, 1]
        return [SimpleNamespace(logprobs=[list(zip(ids, (-0.1, -2.0, -3.0), strict=True))]) for ids in likely]

    monkeypatch.setattr(chat_model.engine, "run", run)
    sample = generator.process([], "Q").sample
    logprobs = generator.choice_logprobs([sample] * 3, [speak, wait])
    np.testing.assert_allclose(logprobs, [[-2, -3], [-np.inf, -0.1], [-np.inf, -np.inf]], rtol=1e-6)
    assert (logprobs[:, 0] > logprobs[:, 1]).tolist() == [True, False, False]


def test_each_frame_is_seen_and_read_once(chat_model):
    (task,) = find(["nano/stream"])
    (question,) = task.questions(QuestionSelection(count=1, seed=3))
    generator, requests, submit = BatchGenerator(chat_model, 1), [], chat_model.engine.submit
    chat_model.engine.forget()
    chat_model.engine.submit = lambda request: requests.append(submit(request)) or requests[-1]
    (state,) = run_streams(generator, [(question.media(), question.text)], 2)
    del chat_model.engine.submit
    # Equal frames are one.
    assert sum(generation.encoded_patches for generation in requests) <= len(state.visual.patches)
    read = [len(generation.request.sample.tokens) - 1 - generation.reused_tokens for generation in requests]
    assert sum(read) <= 2 * len(state.tokens)


def test_a_stream_without_a_video_is_an_error(chat_model):
    pixels = np.zeros((56, 56, 3), np.uint8)
    with pytest.raises(InputError, match="exactly one"):
        run_streams(BatchGenerator(chat_model), [([{"type": "image", "image": pixels}], "Watch.")], 2)
