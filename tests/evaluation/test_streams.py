"""Streams: prompts equal training samples, the more likely token decides, and words become part of the prompt."""

from types import SimpleNamespace

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
from vl3_jax.evaluation import results
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.evaluation.live_streams import watch
from vl3_jax.evaluation.prompts import Prompter, questions_of
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.evaluation.runner import Runner
from vl3_jax.inference.answer_settings import resolve
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.tokenizer import IM_START, STREAM_START

SEED = 7
SETTINGS = resolve({"max_new_tokens": 8}, SamplingConfig(), ProcessorConfig())
pytestmark = pytest.mark.usefixtures("fast_compile")


def streams_of(count):
    """The first samples, and each as it is processed for a model."""
    (task,) = find(["nano/stream"], QuestionSelection(count, SEED))
    return [example("stream", "test", SEED, number) for number in range(count)], questions_of(task, task.items(), {})


def scripted(chat_model, question, words):
    """Watches a stream with a model that says the words of a script; returns the final state and all prompts."""
    prompter = Prompter(chat_model.processor, EvalProtocol())
    (prompt,) = prompter.prompts([question])
    processor, prompts = prompter.processor(question.benchmark), []
    speak, wait = (processor.tokenizer.id_of(name) for name in (IM_START, STREAM_START))
    conversation = watch(processor, prompt.processed, question.item.text, SETTINGS, 2)
    request = next(conversation)
    while True:
        word = words[request.sample.visuals[0].grid[0] - 1]
        if request.sampling.logprobs:
            prompts.append(request.sample.tokens.tolist())
            scores = (-1.0, 0.0) if word is None else (0.0, -1.0)
            answer = SimpleNamespace(logprobs=[list(zip((speak, wait), scores, strict=True))])
        else:
            tokens = processor.tokenizer.encode(word)
            for token in tokens:
                request.is_finished(token)
            answer = SimpleNamespace(tokens=[*tokens, 0])
        try:
            request = conversation.send(answer)
        except StopIteration as end:
            return end.value, prompts


def test_a_stream_with_reference_words_equals_the_training_sample(chat_model):
    config = chat_model.processor.config
    settings = DataSettings(BatchShape(length=1024, patches=1024, vision_tokens=1024), config)
    source = SyntheticSource(f"synthetic://test/stream?count=4&seed={SEED}")
    builder = SampleBuilder(TOKENIZER, settings)
    for number, (sample, question) in enumerate(zip(*streams_of(4), strict=True)):
        state, _ = scripted(chat_model, question, sample.reference["words"])
        record, media = source[number], MediaResolver("")
        trained = builder.sample(
            record, media, compute_sample_size(builder.measure(record, media)[0], settings), (0, 0)
        )
        assert state.tokens == trained.tokens.tolist()
        assert state.is_vision == trained.is_vision.tolist()
        assert np.array_equal(state.visual.keep, trained.visuals[0].keep)
        assert state.words == sample.reference["words"]


def test_each_frame_is_decided_with_the_frames_and_words_before_it(chat_model):
    for sample, question in zip(*streams_of(2), strict=True):
        state, prompts = scripted(chat_model, question, sample.reference["words"])
        assert len(prompts) == state.num_frames
        assert all(prompt == state.tokens[: len(prompt)] for prompt in prompts)


def test_a_silent_model_says_nothing(chat_model):
    for sample, question in zip(*streams_of(2), strict=True):
        state, _ = scripted(chat_model, question, [None] * sample.video.num_frames)
        assert state.words == [None] * sample.video.num_frames
        assert state.new_tokens == 0


def test_a_real_model_decides_after_every_frame(chat_model):
    _, questions = streams_of(2)
    records = ask(chat_model, questions, batch_size=4)
    for question in questions:
        words = records[question.id]["answer"]
        assert len(words) == len(question.item.reference["words"])
        assert all(word is None or isinstance(word, str) for word in words)
    assert "Overall" in results.score_tasks(records.values(), Scoring())["nano/stream"].summary["metrics"]


@pytest.mark.parametrize(
    ("likely", "speaks"),
    [([5, "speak", "wait"], True), (["wait", 5, "speak"], False), (["wait", 5], False), ([5, 6], False)],
)
def test_the_more_likely_of_the_two_tokens_decides(chat_model, likely, speaks):
    _, (question,) = streams_of(1)
    prompter = Prompter(chat_model.processor, EvalProtocol())
    (prompt,) = prompter.prompts([question])
    names = {"speak": IM_START, "wait": STREAM_START}
    ids = [chat_model.processor.tokenizer.id_of(names[name]) if name in names else name for name in likely]
    conversation = watch(prompter.processor(question.benchmark), prompt.processed, "Watch.", SETTINGS, 3)
    first = next(conversation)
    assert (first.sampling.max_new_tokens, first.sampling.logprobs) == (1, 3)
    pairs = list(zip(ids, (-0.1, -2.0, -3.0), strict=False))
    second = conversation.send(SimpleNamespace(logprobs=[pairs]))
    assert (second.sampling.logprobs == 0) == speaks


def test_each_frame_is_seen_and_read_once(chat_model):
    _, (question,) = streams_of(1)
    requests, submit = [], chat_model.engine.submit
    chat_model.engine.forget()
    chat_model.engine.submit = lambda request: requests.append(submit(request)) or requests[-1]
    record = ask(chat_model, [question], batch_size=1)[question.id]
    del chat_model.engine.submit
    # Equal frames are one.
    assert sum(generation.encoded_patches for generation in requests) <= 4 * record["visual_tokens_before_pruning"]
    read = [len(generation.request.sample.tokens) - 1 - generation.reused_tokens for generation in requests]
    assert sum(read) <= 2 * record["prompt_tokens"]


def test_a_stream_without_a_video_is_an_error(chat_model):
    processed = chat_model.process([{"role": "user", "content": "Watch."}])
    with pytest.raises(InputError, match="exactly one"):
        next(watch(chat_model.processor, processed, "Watch.", SETTINGS, 2))


def ask(chat_model, questions, **options):
    """Returns the records by id."""
    return {record["id"]: record for record in Runner(chat_model, **options).ask(questions)}
