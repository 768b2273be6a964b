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
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, NamedTuple, TypeVar

import jax

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
_MOST_THREADS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationGroup(Generic[Result]):
    """Conversations that are prepared together, such as the questions about one video.

    Attributes:
      size: Their number.
      prepare: Decodes the media and returns the conversations; called in a thread, in which they begin, too. What it
        raises ends everything, so a conversation that cannot be prepared is one that returns at once what is to be said
        of it.
    """

    size: int
    prepare: Callable[[], Sequence[Conversation[Result]]]


class _Begun(NamedTuple, Generic[Result]):
    """A conversation with its first request, or its result if it has none."""

    conversation: Conversation[Result]
    request: Request | None
    result: Result | None


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
    threads: int | None = None,
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
      threads: Threads that prepare groups; by default one for each core, and on a CPU, whose cores answer too, for
        every second one. As many conversations wait beside those that are held, at least as many as `rows`.
      on_wait: Called with the seconds in which the devices had nothing to do, because no conversation was ready.

    Raises:
      InputError: The model has too little memory for so many rows, or a conversation lets an error of its own out.
      Exception: What the devices failed with, or was raised by a group.
    """
    engine.reserve(rows=rows)
    if threads is None:
        cores = os.cpu_count() or 1
        threads = min(max(cores // 2, 1) if jax.default_backend() == "cpu" else cores, _MOST_THREADS)
    ahead, coming = max(rows, threads), iter(groups)
    preparing: dict[Future[list[_Begun[Result]]], int] = {}
    ready: collections.deque[_Begun[Result]] = collections.deque()
    held: list[tuple[Conversation[Result], Generation]] = []
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        while True:
            for prepared in [prepared for prepared in preparing if prepared.done()]:
                del preparing[prepared]
                ready.extend(prepared.result())
            while ready and len(held) < rows:
                conversation, request, result = ready.popleft()
                if request is None:
                    yield result  # pyright: ignore[reportReturnType]
                else:
                    yield from _ask(engine, conversation, request, held)
            while len(ready) + sum(preparing.values()) < ahead and (group := next(coming, None)) is not None:
                preparing[pool.submit(_begin, group)] = group.size
            if held:
                engine.step()
                for entry in [entry for entry in held if entry[1].done]:
                    held.remove(entry)
                    yield from _go_on(engine, *entry, held)
            elif preparing:
                start = time.perf_counter()
                concurrent.futures.wait(preparing, return_when=concurrent.futures.FIRST_COMPLETED)
                on_wait(time.perf_counter() - start)
            else:
                return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for _, generation in held:  # after Ctrl-C or an error
            generation.cancel()


def _begin(group: ConversationGroup[Result]) -> list[_Begun[Result]]:
    """Prepares conversations as far as the devices take no part."""
    begun = []
    for conversation in group.prepare():
        try:
            begun.append(_Begun(conversation, next(conversation), None))
        except StopIteration as end:
            begun.append(_Begun(conversation, None, end.value))
    return begun


def _go_on(
    engine: Engine,
    conversation: Conversation[Result],
    answered: Generation,
    held: list[tuple[Conversation[Result], Generation]],
) -> Iterator[Result]:
    """Gives a conversation what the engine has answered, and the engine its next request; yields its result, if any."""
    try:
        request = conversation.throw(answered.error) if answered.error is not None else conversation.send(answered)
    except StopIteration as end:
        yield end.value
    else:
        yield from _ask(engine, conversation, request, held)


def _ask(
    engine: Engine,
    conversation: Conversation[Result],
    request: Request,
    held: list[tuple[Conversation[Result], Generation]],
) -> Iterator[Result]:
    """Gives the engine a request, or the conversation the reason why it is refused; yields its result, if any."""
    while True:
        try:
            held.append((conversation, engine.submit(request)))
            return
        except InputError as error:
            try:
                request = conversation.throw(error)
            except StopIteration as end:
                yield end.value
                return
