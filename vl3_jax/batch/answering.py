"""Answers requests side by side, each as a line of a file of answers; what is wrong with one is its own failure."""

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vl3_jax.batch import ROWS
from vl3_jax.batch.request_file import RequestLine, check_envelope, is_name, parse_line, request_line
from vl3_jax.errors import InputError, RunError, SettingError, TooLongError, printable
from vl3_jax.inference.answer_settings import CONSTRAINT
from vl3_jax.inference.chat_completion import CompletionRequest, completion, parse_body
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.conversations import Conversation, ConversationGroup, answer_ahead, reply
from vl3_jax.processing.media_cache import MediaCache

logger = logging.getLogger(__name__)

Record = dict[str, Any]
_MESSAGE_LENGTH = 1000  # characters of what an unexpected exception says
_CACHE_BYTES = 2**26  # of decoded media, for the next requests about the same ones
# What an answer can fail with; `error.code` of its record.
INVALID_JSON, DUPLICATE, INVALID_REQUEST = "invalid_json", "duplicate_custom_id", "invalid_request"
UNREADABLE, TOO_LONG, NO_MEMORY = "unreadable_media", "context_length_exceeded", "out_of_memory"
NO_MATCH, INTERNAL = "no_answer", "internal_error"


class BatchAnswerer:
    """Answers lines of a file of requests.

    Args:
      model: The model.
      settings: Keywords of `ChatModel.answer` for requests that do not set them.
      name: Name of the model in the responses.
      rows: Requests that are answered side by side.
      threads: Threads that read requests and decode media ahead; by default as `answer_ahead` says.

    Attributes:
      seconds_waited: Seconds in which the devices had nothing to do because no request was ready.
      other_name: A name that requests give to the model and that is not its own; None if there is none.
    """

    def __init__(
        self,
        model: ChatModel,
        settings: Mapping[str, Any] | None = None,
        name: str = "",
        rows: int = ROWS,
        threads: int | None = None,
    ):
        self._model, self._settings, self._name = model, dict(settings or {}), name
        self._rows, self._threads = rows, threads
        self._media = MediaCache(_CACHE_BYTES)
        self.seconds_waited = 0.0
        self.other_name: str | None = None

    def answer(self, lines: Iterable[Callable[[], RequestLine]]) -> Iterator[Record]:
        """Answers requests, in the order in which their answers are complete.

        Args:
          lines: Functions that read a request, called in threads when it is its turn.

        Yields:
          The record of each request: `id`, `custom_id`, and either its `response` or its `error`.

        Raises:
          InputError: The model has too little memory for so many requests side by side.
          RunError: A line cannot be read again.
        """
        groups = (ConversationGroup(1, functools.partial(self._prepare, read)) for read in lines)
        yield from answer_ahead(self._model.engine, groups, self._rows, self._threads, self._wait)

    def _wait(self, seconds: float) -> None:
        self.seconds_waited += seconds

    def _prepare(self, read: Callable[[], RequestLine]) -> list[Conversation[Record]]:
        line, custom_id, code = read(), None, INVALID_JSON
        try:
            request = parse_line(line.content)
            custom_id, code = request.get("custom_id"), INVALID_REQUEST
            check_envelope(request)
            if line.duplicate_of is not None:
                code = DUPLICATE
                raise InputError(f"custom_id {custom_id} is that of line {line.duplicate_of} already; give another one")
            asked = parse_body(request["body"])
            settings = self._resolve(asked)
            code = UNREADABLE
            prompt = self._model.read(asked.messages, settings, self._media)
            return [self._conversation(line, request["custom_id"], asked, prompt, settings)]
        except TooLongError as error:
            return [_ended(_failure(line, custom_id, TOO_LONG, error))]
        except InputError as error:
            return [_ended(_failure(line, custom_id, code, error))]
        except Exception as error:  # one request in a million must not end the others
            described = printable(f"{type(error).__name__}: {error}", _MESSAGE_LENGTH)
            logger.warning("warning: line %d: %s", line.number, described)
            return [_ended(_failure(line, custom_id, INTERNAL, described))]

    def _resolve(self, asked: CompletionRequest) -> Any:
        """Returns the settings of a request, of which those of its body come first."""
        if asked.model not in (None, self._name):
            self.other_name = asked.model
        given = {**self._settings, **asked.settings}
        if any(asked.settings.get(name) is not None for name in CONSTRAINT) and "stop" not in asked.settings:
            given.pop("stop", None)
        try:
            return self._model.resolve(**given)
        except SettingError as error:
            raise error.renamed(asked.fields.get(error.name, error.name)) from None

    def _conversation(
        self, line: RequestLine, custom_id: str, asked: CompletionRequest, prompt: Any, settings: Any
    ) -> Conversation[Record]:
        tokenizer = self._model.processor.tokenizer
        try:
            constraint = self._model.constraint(settings)
            text, generation = yield from reply(tokenizer, prompt.sample, settings, constraint)
        except TooLongError as error:
            return _failure(line, custom_id, TOO_LONG, error)
        except InputError as error:
            return _failure(line, custom_id, NO_MEMORY, error)
        except RunError as error:
            return _failure(line, custom_id, NO_MATCH, error)
        body = completion(asked, self._name, text, generation, tokenizer, f"chatcmpl-{line.key:016x}")
        warnings = {"warnings": prompt.warnings} if prompt.warnings else {}
        response = {"status_code": 200, "request_id": line.id, "body": body | warnings}
        return {"id": line.id, "custom_id": custom_id, "response": response, "error": None}


def answer_requests(
    model: ChatModel, requests: Iterable[Mapping[str, Any]], *, rows: int = ROWS, **settings: Any
) -> Iterator[Record]:
    """Answers requests in OpenAI's batch form, several side by side, with their media decoded ahead.

    Args:
      model: A loaded model.
      requests: Objects such as {"custom_id": "1", "body": {"messages": [...], "max_tokens": 20}}, taken when they are
        needed. Their names are not compared.
      rows: Requests that are answered side by side.
      **settings: Keywords of `ChatModel.answer` for requests that do not set them.

    Yields:
      Objects such as {"custom_id": "1", "response": {"body": ...}, "error": None}, in the order in which answers are
      complete. What is wrong with a request is its `error`, with its number as `line`.

    Raises:
      InputError: A setting is invalid, or the model has too little memory.
    """
    model.resolve(**settings)

    def line(number: int, request: Mapping[str, Any]) -> RequestLine:
        return request_line(number, json.dumps(request).encode())

    lines = (functools.partial(line, number, request) for number, request in enumerate(requests, start=1))
    yield from BatchAnswerer(model, settings, rows=rows).answer(lines)


def _failure(line: RequestLine, custom_id: Any, code: str, message: object) -> Record:
    shown = custom_id if is_name(custom_id) else None
    error = {"code": code, "message": str(message), "line": line.number}
    return {"id": line.id, "custom_id": shown, "response": None, "error": error}


def _ended(record: Record) -> Conversation[Record]:
    """Returns a conversation that asks nothing."""
    return record
    yield
