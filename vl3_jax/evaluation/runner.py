"""Asks a model questions side by side: media are decoded ahead in threads, and requests join and leave the engine."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.conversations import Conversation, reply
from vl3_jax.evaluation.live_streams import watch
from vl3_jax.evaluation.prompts import Prompt, Prompter, Question, media_groups
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.evaluation.results import answer_record
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Generation
from vl3_jax.processing.packed_batch import Visual
from vl3_jax.processing.processor import Processor

Record = dict[str, Any]
_MOST_LIKELY = 64  # tokens among which those that decide in a live stream are looked for


@dataclasses.dataclass(eq=False)
class _Running:
    """A question with a request in the engine."""

    question: Question
    conversation: Conversation[Record]
    generation: Generation


class Runner:
    """Answers questions, several at a time.

    Attributes:
      prompter: Makes the prompts.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        repetition_penalty: float = 1.0,
        protocol: EvalProtocol | None = None,
        batch_size: int = 8,
        threads: int = 4,
    ):
        """Creates a runner.

        Args:
          engine: The model.
          processor: The processor of its checkpoint.
          repetition_penalty: That of the checkpoint.
          protocol: How to ask; the paper's if None.
          batch_size: Number of questions that are answered side by side.
          threads: Number of threads that decode media ahead.
        """
        self._protocol = protocol or EvalProtocol()
        self.prompter = Prompter(processor, self._protocol)
        self._engine, self._penalty = engine, repetition_penalty
        self._batch_size, self._threads = batch_size, threads

    def ask(self, questions: Sequence[Question], on_record: Callable[[Record], None]) -> None:
        """Asks questions; those about the same media follow one another.

        Args:
          questions: The questions.
          on_record: Called with each line of the answer file as soon as it is complete, in any order. A question that
            cannot be asked has an `error`.

        Raises:
          InputError: The model has too little memory.
        """
        self._engine.reserve(rows=min(self._batch_size, max(len(questions), 1)))
        groups = collections.deque(media_groups(questions))
        decoding: collections.deque[tuple[int, Future[list[Prompt]]]] = collections.deque()
        ready: collections.deque[Prompt] = collections.deque()
        running: list[_Running] = []
        pool = ThreadPoolExecutor(self._threads)
        try:
            while groups or decoding or ready or running:
                # As many prompts ahead as are being answered, however many there are about one medium.
                while groups and len(ready) + sum(size for size, _ in decoding) < self._batch_size:
                    group = groups.popleft()
                    decoding.append((len(group), pool.submit(self.prompter.prompts, group)))
                while decoding and (decoding[0][1].done() or not (running or ready)):
                    ready.extend(decoding.popleft()[1].result())
                while ready and len(running) < self._batch_size:
                    self._begin(ready.popleft(), running, on_record)
                if running:
                    self._engine.step()
                for entry in [entry for entry in running if entry.generation.done]:
                    running.remove(entry)
                    self._continue(entry.question, entry.conversation, entry.generation.result(), running, on_record)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for entry in running:  # after Ctrl-C or an error
                entry.generation.cancel()

    def _begin(self, prompt: Prompt, running: list[_Running], on_record: Callable[[Record], None]) -> None:
        if prompt.processed is None:
            on_record(_failure(prompt.question, prompt.error or ""))
        else:
            self._continue(prompt.question, self._conversation(prompt), None, running, on_record)

    def _continue(
        self,
        question: Question,
        conversation: Conversation[Record],
        answered: Generation | None,
        running: list[_Running],
        on_record: Callable[[Record], None],
    ) -> None:
        """Gives a conversation what the engine has answered, if anything, and the engine its next request."""
        try:
            request = next(conversation) if answered is None else conversation.send(answered)
            running.append(_Running(question, conversation, self._engine.submit(request)))
        except StopIteration as end:
            on_record(end.value)
        except InputError as error:
            on_record(_failure(question, str(error)))

    def _conversation(self, prompt: Prompt) -> Conversation[Record]:
        benchmark, processed = prompt.question.benchmark, prompt.processed
        assert processed is not None
        sampling = self._protocol.sampling(self._penalty, benchmark.max_new_tokens)
        if benchmark.is_stream:
            processor, text = self.prompter.processor(benchmark), prompt.question.item.text
            most_likely = min(_MOST_LIKELY, self._engine.model.config.text.vocab_size)
            state = yield from watch(processor, processed, text, sampling, most_likely)
            counts = _counts(state.new_tokens, len(state.tokens), [state.visual])
            return _record(prompt.question, state.words, counts)
        sample = processed.sample
        text, generation = yield from reply(self.prompter.tokenizer, sample, sampling)
        counts = _counts(len(generation.tokens), len(sample.tokens), sample.visuals)
        counts["finish_reason"] = generation.finish_reason
        return _record(prompt.question, text, counts)


def _record(question: Question, answer: Any, others: Record) -> Record:
    return answer_record(question.benchmark.task, question.item, answer, hash=question.hash, **others)


def _failure(question: Question, error: str) -> Record:
    missing = {"missing_media": True} if question.item.missing_media() else {}
    return _record(question, None, {"error": error, **missing})


def _counts(new_tokens: int, prompt_tokens: int, visuals: Sequence[Visual]) -> Record:
    return {
        "new_tokens": new_tokens,
        "prompt_tokens": prompt_tokens,
        "visual_tokens": sum(visual.num_tokens for visual in visuals),
        "visual_tokens_before_pruning": sum(len(visual.keep) for visual in visuals),
    }
