"""Asks a model questions side by side, with their media decoded ahead."""

from collections.abc import Iterator, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.drawn_answers import drawn_answer
from vl3_jax.evaluation.live_streams import watch
from vl3_jax.evaluation.prompts import PreparedQuestion, Prompter, Question, media_groups
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.evaluation.results import answer_record
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.conversations import Conversation, ConversationGroup, answer_ahead, reply
from vl3_jax.processing.packed_batch import Visual

Record = dict[str, Any]
_MOST_LIKELY = 64  # tokens among which those that decide in a live stream are looked for


class Runner:
    """Answers questions, several at a time.

    Args:
      model: The model.
      protocol: How to ask; the paper's if None.
      batch_size: Number of questions that are answered side by side.
      threads: Number of threads that decode media ahead; by default as `answer_ahead` says.

    Attributes:
      prompter: Makes the prompts.
    """

    def __init__(
        self, model: ChatModel, protocol: EvalProtocol | None = None, batch_size: int = 8, threads: int | None = None
    ):
        self._model, self._protocol = model, protocol or EvalProtocol()
        self.prompter = Prompter(model.processor, self._protocol)
        self._batch_size, self._threads = batch_size, threads

    def ask(self, questions: Sequence[Question]) -> Iterator[Record]:
        """Asks questions; those about the same media follow one another.

        Yields:
          Each line of the answer file as soon as it is complete, in any order. A question that cannot be asked has an
          `error`.

        Raises:
          InputError: The model has too little memory.
        """
        groups = (
            ConversationGroup(len(group), lambda group=group: self._conversations(group))
            for group in media_groups(questions)
        )
        rows = min(self._batch_size, max(len(questions), 1))
        yield from answer_ahead(self._model.engine, groups, rows, self._threads)

    def _conversations(self, questions: Sequence[Question]) -> list[Conversation[Record]]:
        return [self._conversation(prompt) for prompt in self.prompter.prompts(questions)]

    def _conversation(self, prompt: PreparedQuestion) -> Conversation[Record]:
        """Returns the record of a question, or the failure that its record is."""
        question = prompt.question
        try:
            if prompt.processed is None:
                raise InputError(prompt.error or "")
            return (yield from self._answered(prompt))
        except InputError as error:
            missing = {"missing_media": True} if question.item.missing_media() else {}
            return _record(question, None, {"error": str(error), **missing})

    def _answered(self, prompt: PreparedQuestion) -> Conversation[Record]:
        benchmark, processed = prompt.question.benchmark, prompt.processed
        assert processed is not None
        penalty = self._model.generation_config.repetition_penalty
        settings = self._protocol.settings(self._model.processor.config, benchmark, penalty)
        if benchmark.is_stream:
            processor, text = self.prompter.processor(benchmark), prompt.question.item.text
            most_likely = min(_MOST_LIKELY, self._model.engine.model.config.text.vocab_size)
            state = yield from watch(processor, processed, text, settings, most_likely)
            counts = _counts(state.new_tokens, len(state.tokens), [state.visual])
            return _record(prompt.question, state.words, counts)
        sample = processed.sample
        if benchmark.draws:
            answer, generation = yield from drawn_answer(self._model, prompt.question.item, sample, settings)
            counts = _counts(len(generation.tokens), len(sample.tokens), sample.visuals)
            return _record(prompt.question, answer, counts)
        text, generation = yield from reply(self.prompter.tokenizer, sample, settings)
        counts = _counts(len(generation.tokens), len(sample.tokens), sample.visuals)
        counts["finish_reason"] = generation.finish_reason
        return _record(prompt.question, text.strip(), counts)


def _record(question: Question, answer: Any, others: Record) -> Record:
    return answer_record(question.benchmark.task, question.item, answer, hash=question.hash, **others)


def _counts(new_tokens: int, prompt_tokens: int, visuals: Sequence[Visual]) -> Record:
    return {
        "new_tokens": new_tokens,
        "prompt_tokens": prompt_tokens,
        "visual_tokens": sum(visual.num_tokens for visual in visuals),
        "visual_tokens_before_pruning": sum(len(visual.keep) for visual in visuals),
    }
