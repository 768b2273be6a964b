"""Values of JSON files have the type and the range that was asked for, or are refused in one line."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, parse_json, read_object

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
# What a method returns for a value that it does not refuse.
METHODS = {
    "integer": lambda value: value is None or (type(value) is int and 0 <= value < 2**31),
    "integers": lambda value: all(type(item) is int and 0 <= item < 2**31 for item in value),
    "number": lambda value: value is None or (type(value) is float and 0 < value < math.inf),
    "numbers": lambda value: value is None or [type(item) for item in value] == [float] * 3,
    "flag": lambda value: type(value) is bool,
    "text": lambda value: value is None or type(value) is str,
    "texts": lambda value: all(type(item) is str for item in value),
    "section": lambda value: type(value) is JsonObject,
    "sections": lambda value: all(type(item) is JsonObject for item in value),
}


def outcome(call) -> tuple[Any, str | None]:
    """Returns the result of a call, and the message of its InputError."""
    try:
        return call(), None
    except InputError as error:
        return None, str(error)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=50)
@given(VALUES)
def test_types_and_ranges(method, value):
    values = JsonObject({"a": value}, "config.json", "text_config.")
    arguments = (3,) if method == "numbers" else ()
    result, refusal = outcome(lambda: getattr(values, method)("a", *arguments))
    if refusal is None:
        assert METHODS[method](result)
    else:
        assert refusal.startswith("config.json: text_config.a is ")
        assert refusal.isprintable()
        assert len(refusal) < 200


@given(st.binary() | st.text().map(str.encode) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_content_is_parsed_or_refused(content):
    _, refusal = outcome(lambda: parse_json(content, "config.json"))
    assert refusal is None or refusal.startswith("config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 10**6, "nested more than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 levels"),
        ("1" * 5000, "not valid JSON"),
        ('{"a": 1,\n "a": 2}', "'a' occurs twice"),
        ('{\n"a": }', "config.json:2: not valid JSON"),
        ('"' + "x" * 100 + '"', "102 bytes long"),
    ],
)
def test_bounds(content, words):
    limit = 100 if "bytes" in words else 2**25
    with pytest.raises(InputError, match=words):
        parse_json(content.encode(), "config.json", limit, unique=True)


def test_files(tmp_path):
    assert read_object(tmp_path / "missing.json") == {}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match=r"list\.json: holds \[1\], and an object is expected"):
        read_object(tmp_path / "list.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json: not a regular file"):
        read_object(tmp_path / "folder.json", missing_ok=False)
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "bom.json").integer("a") == 1
