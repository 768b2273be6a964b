"""OpenAI's chat completions: the body of a request becomes messages and settings, an answer the object of a response.

    request = parse_body({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20, "temperature": 0.5})
    request.messages, request.settings       # arguments of `ChatModel.answer`

Every keyword of `ChatModel.answer` but `allow_remote` is a field of the body too (`fps`, `visual_budget`, `adapter`,
`regex`, ...). What would change the answer and is not supported is refused by its name; what changes nothing, such as
`user` and `metadata`, is ignored.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError, SettingError, printable, repr_of
from vl3_jax.inference import answer_settings
from vl3_jax.inference.requests import Generation
from vl3_jax.processing.messages import Turn, parse_messages
from vl3_jax.processing.tokenizer import Tokenizer

MOST_LIKELY = 20  # tokens that are looked at for `logprobs`
_UNLIKELY = -9999.0  # the log-probability of a token that is not among them
# Field of the body: keyword of `ChatModel.answer`.
_RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_OWN = {
    *(*answer_settings.SAMPLING, *answer_settings.CONSTRAINT, *answer_settings.PROCESSOR, *answer_settings.VIDEO),
    *(answer_settings.PRUNE, answer_settings.ADAPTER),
}
_FORM = ("messages", "model", "response_format", "logprobs", "top_logprobs")
_IGNORED = {
    *("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store"),
    *("stream_options", "user"),
}
# Fields that are supported only with a value that asks for nothing, besides null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
_FORMATS = ("text", "json_object", "json_schema")


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """The body of a request.

    Attributes:
      messages: The conversation.
      settings: Keywords of `ChatModel.answer`; a constraint that the body lifts is None.
      fields: Field of the body from which a keyword comes, where they have different names.
      model: The model that the body names, or None.
      top_logprobs: Most likely tokens that the response lists at each token; None without `logprobs`.
    """

    messages: list[Turn]
    settings: dict[str, Any]
    fields: dict[str, str]
    model: str | None
    top_logprobs: int | None


def parse_body(body: Any) -> CompletionRequest:
    """Checks the body of a request.

    Raises:
      InputError: The body or a message is malformed, or a field is not known or not supported; the error names it.
      SettingError: A value that a field cannot have.
    """
    if not isinstance(body, Mapping):
        raise InputError(f"body is {printable(repr_of(body))}; give an object with messages")
    settings: dict[str, Any] = {}
    for name, value in body.items():
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise SettingError(name, value, "that is not supported; leave it out")
        elif name in _RENAMED or name in _OWN - set(_FORM):
            _set(settings, name, value)
        elif name not in _FORM and name not in _IGNORED:
            known = sorted({*_FORM, *_RENAMED, *_OWN})
            raise InputError(f"unknown field {printable(repr_of(name))}; known are {', '.join(known)}")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise SettingError("model", model, "give a text")
    settings |= _constraint(settings, body.get("response_format"))
    top_logprobs = _top_logprobs(body.get("logprobs"), body.get("top_logprobs"))
    if top_logprobs is not None:
        settings["logprobs"] = MOST_LIKELY
    fields = {keyword: name for name, keyword in _RENAMED.items() if body.get(name) is not None}
    return CompletionRequest(parse_messages(_messages(body.get("messages"))), settings, fields, model, top_logprobs)


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    """Adds a field to the settings; null is as if it were left out."""
    if value is None:
        return
    keyword = _RENAMED.get(name, name)
    if settings.setdefault(keyword, value) != value:
        raise SettingError(name, value, "max_tokens and max_completion_tokens are the same; leave one of them out")
    if name in ("stop", "choices"):
        texts = [value] if isinstance(value, str) and name == "stop" else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            raise SettingError(name, value, "give texts, none of them empty")
        settings[keyword] = tuple(texts)


def _constraint(settings: Mapping[str, Any], response_format: Any) -> dict[str, Any]:
    """Returns all settings of the constraint if the body has any, so that it replaces one from elsewhere."""
    given = {name: settings[name] for name in answer_settings.CONSTRAINT if name in settings}
    if response_format is None:
        return dict.fromkeys(answer_settings.CONSTRAINT) | given if given else {}
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in _FORMATS:
        advice = f"give an object with a type, which is one of {', '.join(_FORMATS)}"
        raise SettingError("response_format", response_format, advice)
    if given:
        raise InputError(f"response_format and {next(iter(given))} say both what the answer must match; leave one out")
    if kind == "json_object":
        return dict.fromkeys(answer_settings.CONSTRAINT) | {"json_schema": {"type": "object"}}
    if kind == "text":
        return dict.fromkeys(answer_settings.CONSTRAINT)
    described = response_format.get("json_schema")
    if not isinstance(described, Mapping) or not isinstance(described.get("schema"), Mapping):
        raise SettingError("response_format", response_format, 'give {"json_schema": {"schema": {...}}} with it')
    return dict.fromkeys(answer_settings.CONSTRAINT) | {"json_schema": described["schema"]}


def _top_logprobs(logprobs: Any, count: Any) -> int | None:
    if logprobs is not None and not isinstance(logprobs, bool):
        raise SettingError("logprobs", logprobs, "give true or false, and their number as top_logprobs")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_LIKELY):
        raise SettingError("top_logprobs", count, f"give an integer from 0 to {MOST_LIKELY}")
    if count and not logprobs:
        raise SettingError("top_logprobs", count, 'it needs "logprobs": true')
    return (count or 0) if logprobs else None


def _messages(messages: Any) -> Any:
    """Returns messages with the roles of the model, and without keys that are null, such as `refusal`."""
    if not isinstance(messages, list):
        return messages
    return [_message(message) if isinstance(message, Mapping) else message for message in messages]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in message.items() if value is not None}
    return kept | ({"role": "system"} if kept.get("role") == "developer" else {})


def completion(
    request: CompletionRequest, model: str, text: str, generation: Generation, tokenizer: Tokenizer, identifier: str
) -> dict[str, Any]:
    """Returns the `chat.completion` object of an answer.

    Args:
      request: The request.
      model: Name of the model that answered.
      text: The answer without its stop token.
      generation: Its tokens.
      tokenizer: Tokenizer of the model.
      identifier: What the object is known by.
    """
    prompt_tokens, new_tokens = len(generation.request.sample.tokens), len(generation.tokens)
    logprobs = None
    if request.top_logprobs is not None:
        logprobs = {"content": _token_logprobs(generation, request.top_logprobs, tokenizer), "refusal": None}
    return {
        "id": identifier,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": generation.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        },
    }


def _token_logprobs(generation: Generation, count: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Returns each token of an answer but the stop token with its own log-probability and those of the most likely."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token], skip_special_tokens=False)
        # A part of a character has no text of its own.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    tokens: Sequence[int] = generation.tokens
    if tokens and tokens[-1] in generation.engine.stop_ids:
        tokens = tokens[:-1]
    return [
        entry(token, dict(likely).get(token, _UNLIKELY)) | {"top_logprobs": [entry(*each) for each in likely[:count]]}
        for token, likely in zip(tokens, generation.logprobs or [], strict=False)
    ]
