"""Many conversations with one engine: their media are decoded ahead in threads, and they are answered side by side.

A conversation is a generator: it yields what the engine is asked, gets the complete answer, and returns its result.

    def conversation(sample):
        text, generation = yield from reply(tokenizer, sample, settings)
        return {"text": text}

    def prepare(messages):                                   # in a thread, while the devices answer others
        return [conversation(processor(messages).sample)]

    groups = (ConversationGroup(1, functools.partial(prepare, messages)) for messages in all_messages)
    for result in answer_ahead(engine, groups, rows=8):
        print(result)
"""

import collections
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vl3_jax.errors import InputError
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.answer_text import AnswerText
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Generation, Request
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.tokenizer import Tokenizer

Result = TypeVar("Result")
Conversation = Generator[Request, Generation, Result]
THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationGroup(Generic[Result]):
    """Conversations that are prepared together, such as the questions about one video.

    Attributes:
      size: Their number.
      prepare: Decodes the media and returns the conversations; called in a thread. What it raises ends everything, so a
        conversation that cannot be prepared is one that returns at once what is to be said of it.
    """

    size: int
    prepare: Callable[[], Sequence[Conversation[Result]]]


def reply(tokenizer: Tokenizer, sample: Sample, settings: AnswerSettings) -> Conversation[tuple[str, Generation]]:
    """Asks for one answer.

    Args:
      tokenizer: Tokenizer of the model.
      sample: A prompt that ends where the answer begins.
      settings: Decoding, and the adapter that answers.

    Returns:
      The text without its stop token, and the tokens.
    """
    text = AnswerText(tokenizer, settings.sampling.stop)
    generation = yield Request(sample, settings.sampling, text.add, streams=False, adapter=settings.adapter)
    text.end()
    return text.whole, generation


def answer_ahead(
    engine: Engine, groups: Iterable[ConversationGroup[Result]], rows: int, threads: int = THREADS
) -> Iterator[Result]:
    """Holds conversations side by side and yields the result of each as soon as it is complete, in any order.

    As many conversations as are held wait with decoded media, so memory does not grow with the number of groups, which
    are taken from their iterator when they are needed. Conversations of one group begin one after the other. A request
    that the engine refuses raises its InputError inside the conversation, at the `yield`. Leaving early cancels the
    rest.

    Args:
      engine: The model.
      groups: The conversations.
      rows: Conversations that are held side by side; the engine makes room for them.
      threads: Threads that prepare groups.

    Raises:
      InputError: The model has too little memory for so many rows, or a conversation lets an error of its own out.
      Exception: What ended a request early, or was raised by a group.
    """
    engine.reserve(rows=rows)
    coming = iter(groups)
    preparing: collections.deque[tuple[int, Future[Sequence[Conversation[Result]]]]] = collections.deque()
    ready: collections.deque[Conversation[Result]] = collections.deque()
    held: list[tuple[Conversation[Result], Generation]] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        while True:
            while len(ready) + sum(size for size, _ in preparing) < rows and (group := next(coming, None)) is not None:
                preparing.append((group.size, pool.submit(group.prepare)))
            if not (preparing or ready or held):
                return
            while preparing and (preparing[0][1].done() or not (held or ready)):
                ready.extend(preparing.popleft()[1].result())
            while ready and len(held) < rows:
                yield from _go_on(engine, ready.popleft(), None, held)
            if held:
                engine.step()
            for entry in [entry for entry in held if entry[1].done]:
                held.remove(entry)
                yield from _go_on(engine, *entry, held)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for _, generation in held:  # after Ctrl-C or an error
            generation.cancel()


def _go_on(
    engine: Engine,
    conversation: Conversation[Result],
    answered: Generation | None,
    held: list[tuple[Conversation[Result], Generation]],
) -> Iterator[Result]:
    """Gives a conversation what the engine has answered, if anything, and the engine its next request.

    Yields:
      The result, if the conversation is complete.
    """
    try:
        request = next(conversation) if answered is None else conversation.send(answered.result())
        while True:
            try:
                held.append((conversation, engine.submit(request)))
                return
            except InputError as error:
                request = conversation.throw(error)
    except StopIteration as end:
        yield end.value
