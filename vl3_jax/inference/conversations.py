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
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from vl3_jax.errors import InputError
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.answer_text import AnswerText
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.requests import Generation, Request
from vl3_jax.inference.token_constraint import TokenConstraint
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


def reply(
    tokenizer: Tokenizer, sample: Sample, settings: AnswerSettings, constraint: TokenConstraint | None = None
) -> Conversation[tuple[str, Generation]]:
    """Asks for one answer.

    Args:
      tokenizer: Tokenizer of the model.
      sample: A prompt that ends where the answer begins.
      settings: Decoding, and the adapter that answers.
      constraint: What the answer must match, for this request alone; None if it is free.

    Returns:
      The text without its stop token, and the tokens.
    """
    text = AnswerText(tokenizer, settings.sampling.stop)
    generation = yield Request(sample, settings.sampling, text.add, False, settings.adapter, constraint)
    text.end()
    return text.whole, generation


def answer_ahead(
    engine: Engine,
    groups: Iterable[ConversationGroup[Result]],
    rows: int,
    threads: int = THREADS,
    ahead: int | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Result]:
    """Holds conversations side by side and yields the result of each as soon as it is complete, in any order.

    A few conversations wait with decoded media, so memory does not grow with the number of groups, which are taken from
    their iterator when they are needed. A group that is ready overtakes one that still decodes.
    Conversations of one group begin one after the other. What the engine refuses a request with, and what ends its
    answer early, is raised inside the conversation, at the `yield`. Leaving early cancels the rest.

    Args:
      engine: The model.
      groups: The conversations.
      rows: Conversations that are held side by side; the engine makes room for them.
      threads: Threads that prepare groups.
      ahead: Conversations that are prepared, or wait, beside those that are held; by default as many as `rows`.
      on_wait: Called with the seconds in which the devices had nothing to do, because no conversation was ready.

    Raises:
      InputError: The model has too little memory for so many rows, or a conversation lets an error of its own out.
      Exception: What the devices failed with, or was raised by a group.
    """
    engine.reserve(rows=rows)
    coming = iter(groups)
    preparing: dict[Future[Sequence[Conversation[Result]]], int] = {}
    ready: collections.deque[Conversation[Result]] = collections.deque()
    held: list[tuple[Conversation[Result], Generation]] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        while True:
            while len(ready) + sum(preparing.values()) < (ahead or rows) and (group := next(coming, None)) is not None:
                preparing[pool.submit(group.prepare)] = group.size
            if not (preparing or ready or held):
                return
            if not (ready or held):
                start = time.perf_counter()
                concurrent.futures.wait(preparing, return_when=concurrent.futures.FIRST_COMPLETED)
                on_wait(time.perf_counter() - start)
            for prepared in [prepared for prepared in preparing if prepared.done()]:
                del preparing[prepared]
                ready.extend(prepared.result())
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
        if answered is None:
            request = next(conversation)
        elif answered.error is not None:
            request = conversation.throw(answered.error)
        else:
            request = conversation.send(answered)
        while True:
            try:
                held.append((conversation, engine.submit(request)))
                return
            except InputError as error:
                request = conversation.throw(error)
    except StopIteration as end:
        yield end.value
