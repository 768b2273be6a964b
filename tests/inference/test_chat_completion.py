"""OpenAI's bodies of requests: what they set, what is refused by its name, and what is ignored."""

import pytest

from vl3_jax.errors import InputError, SettingError
from vl3_jax.inference.answer_settings import CONSTRAINT, resolve
from vl3_jax.inference.chat_completion import MOST_LIKELY, parse_body
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.processor_config import ProcessorConfig

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object"}
FREE = dict.fromkeys(CONSTRAINT)


def parsed(**body):
    return parse_body({"messages": MESSAGES, **body})


@pytest.mark.parametrize(
    ("body", "settings"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"temperature": 0.5, "top_p": 0.9, "seed": None}, {"temperature": 0.5, "top_p": 0.9}),
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["a", "b"], "top_k": 4}, {"stop": ("a", "b"), "top_k": 4}),
        ({"response_format": {"type": "text"}}, FREE),
        ({"response_format": {"type": "json_object"}}, FREE | {"json_schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            FREE | {"json_schema": SCHEMA},
        ),
        ({"choices": ["yes", "no"], "fps": 2}, FREE | {"choices": ("yes", "no"), "fps": 2}),
        ({"adapter": "legal", "visual_budget": 0.5}, {"adapter": "legal", "visual_budget": 0.5}),
        ({"logprobs": True}, {"logprobs": MOST_LIKELY}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"user": "me", "metadata": {"a": 1}, "store": False, "n": 1, "tools": [], "stream": False}, {}),
    ],
)
def test_settings(body, settings):
    found = parsed(**body)
    assert found.settings == settings
    resolve(found.settings, SamplingConfig(), ProcessorConfig())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "n is 2; that is not supported"),
        ({"stream": True}, "stream is True"),
        ({"tools": [{"type": "function"}]}, "tools is"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5"),
        ({"temprature": 1}, "unknown field 'temprature'; known are adapter, "),
        ({"allow_remote": True}, "unknown field 'allow_remote'"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "are the same"),
        ({"stop": [""]}, "stop is"),
        ({"stop": 5}, "stop is 5"),
        ({"choices": "yes"}, "choices is 'yes'"),
        ({"logprobs": 5}, "logprobs is 5; give true or false"),
        ({"top_logprobs": 5}, 'needs "logprobs": true'),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"response_format": "json"}, "response_format is 'json'"),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        ({"response_format": {"type": "json_schema"}}, "response_format is"),
        ({"response_format": {"type": "text"}, "regex": "a"}, "response_format and regex"),
        ({"model": 5}, "model is 5"),
        ({"messages": None}, "a conversation is a list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
    ],
)
def test_what_is_refused(body, message):
    with pytest.raises(InputError) as refused:
        parsed(**body)
    assert message in str(refused.value)


def test_an_invalid_value_is_named_as_the_body_names_it():
    found = parsed(max_tokens=0)
    with pytest.raises(SettingError) as refused:
        resolve(found.settings, SamplingConfig(), ProcessorConfig())
    assert found.fields[refused.value.name] == "max_tokens"


def test_messages_of_earlier_answers_and_media():
    part = {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat.", "refusal": None, "tool_calls": None},
    ]
    assert parse_body({"messages": messages}).messages == [
        Turn("system", ["Be brief."]),
        Turn("user", [MediaPart("image", "a.png"), "What?"]),
        Turn("assistant", ["A cat."]),
    ]
    for body in (None, [], "x"):
        with pytest.raises(InputError, match="give an object with messages"):
            parse_body(body)
