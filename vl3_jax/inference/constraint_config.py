"""What an answer must match: a JSON schema, a regular expression, or one of several texts."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vl3_jax.errors import SettingError, printable
from vl3_jax.json_file import parse_json

# A schema is answered on one line, as `json.dumps` writes: white space of its own choice would be without end.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_LARGEST_INTEGER = 2**53  # of those that a float holds
Problem = tuple[str, Any, str]  # the arguments of a SettingError


@dataclasses.dataclass(frozen=True)
class ConstraintConfig:
    """The constraint of an answer, at most one of three.

    Attributes:
      json_schema: A JSON schema, as a mapping or as JSON text; the answer is a JSON value that it allows.
      regex: A regular expression that the whole answer matches.
      choices: Texts, one of which is the answer.
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choices: tuple[str, ...] | None = None

    def __post_init__(self):
        given = self._given()
        if len(given) > 1:
            raise SettingError(*given[1], f"{given[0][0]} is given too; leave one of them out")
        if self.choices is not None:
            is_list = isinstance(self.choices, list | tuple)
            if not is_list or not self.choices or not all(isinstance(text, str) and text for text in self.choices):
                raise SettingError("choices", self.choices, "give at least one text, none of them empty")
            object.__setattr__(self, "choices", tuple(self.choices))
        if self.regex is not None and not (isinstance(self.regex, str) and self.regex):
            raise SettingError("regex", self.regex, "give the text of a regular expression")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema(self.json_schema))
        if given and (problem := _problem(self)):
            raise SettingError(*problem)

    @property
    def is_free(self) -> bool:
        """Whether nothing constrains the answer."""
        return not self._given()

    @property
    def given(self) -> tuple[str, Any]:
        """Name and value of what constrains the answer."""
        return self._given()[0]

    def _given(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in vars(self).items() if value is not None]

    def grammar(self) -> str:
        """Returns the grammar of the answer in the form of llguidance.

        Raises:
          ValueError: Nothing constrains the answer.
        """
        from llguidance import LLMatcher

        if self.json_schema is not None:
            schema = json.loads(str(self.json_schema))
            narrow = schema if _combines_objects(schema) else _closed(schema)
            return LLMatcher.grammar_from_json_schema(json.dumps(narrow), overrides=_JSON_OPTIONS)
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choices is not None:
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_quoted, self.choices))}")
        raise ValueError("a free answer has no grammar")


@functools.lru_cache(maxsize=64)
def _problem(config: ConstraintConfig) -> Problem | None:
    """Returns what is wrong with a constraint, with its place in a schema."""
    from llguidance import LLMatcher

    schema = None if config.json_schema is None else json.loads(str(config.json_schema))
    if schema is not None and (problem := _schema_problem(schema)):
        return problem
    try:
        error = LLMatcher.validate_grammar(config.grammar())
    except ValueError as failure:  # half a character (a surrogate)
        error = str(failure)
    if not error:
        return None
    found = re.search(r"\berror: (.+)|lookarounds not supported|.+", error)
    reason = error if found is None else found[1] or found[0]
    if schema is not None:
        place, part = _place_of(schema, error)
        return f"json_schema at {place}", part, f"it cannot be answered: {reason}"
    if config.regex is not None:
        return "regex", config.regex, f"that is not a regular expression that can be answered: {reason}"
    return "choices", config.choices, reason


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(value: Any) -> str:
    """Returns a schema as JSON text.

    Raises:
      InputError: The text is not JSON, which names the line, or too large or too deep.
      SettingError: The value is no schema.
    """
    if hasattr(value, "model_json_schema"):  # a class of pydantic
        value = value.model_json_schema()
    if isinstance(value, str):
        value = parse_json(value.encode(errors="surrogatepass"), "json_schema", unique=True)
    if not isinstance(value, Mapping):
        raise SettingError("json_schema", value, 'give a JSON object, such as {"type": "object", "properties": {...}}')
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError("json_schema", value, f"it is not JSON ({error})") from None
    parse_json(text.encode(), "json_schema")  # refuses what is nested too deep
    return text


def _combines_objects(schema: Any) -> bool:
    """Returns whether several parts of a schema say something about one object."""
    if isinstance(schema, list):
        return any(map(_combines_objects, schema))
    if not isinstance(schema, Mapping):
        return False
    combined = "properties" in schema and schema.keys() & {"$ref", "$dynamicRef", "anyOf", "oneOf"}
    return "allOf" in schema or bool(combined) or any(map(_combines_objects, schema.values()))


def _closed(schema: Any) -> Any:
    """Returns a schema whose objects have the properties that it names and no others, unless it says which."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {key: part if key in ("enum", "const") else _closed(part) for key, part in schema.items()}
    properties, required = schema.get("properties"), schema.get("required", [])
    is_named = isinstance(properties, Mapping) and isinstance(required, list) and set(required) <= set(properties)
    if is_named and not schema.keys() & {"additionalProperties", "patternProperties", "unevaluatedProperties"}:
        closed["additionalProperties"] = False
    return closed


def _schema_problem(schema: Mapping[str, Any]) -> Problem | None:
    """Returns where a schema breaks the rules of JSON schemas, or what llguidance would change without a word."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for

    validator = validator_for(schema, Draft202012Validator)
    error = best_match(validator(validator.META_SCHEMA).iter_errors(schema))
    if error is not None:
        return f"json_schema at {error.json_path}", error.instance, printable(error.message)
    for place, _, part in _parts(schema):
        if isinstance(part, int) and abs(part) > _LARGEST_INTEGER and re.search(r"\.(const|enum)\b", place):
            return f"json_schema at {place}", part, "an integer beyond 2^53 is not kept exactly; ask for a string"
    return None


def _parts(schema: Any, place: str = "$", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields place, key and value of each part of a schema, the inner ones last."""
    yield place, key, schema
    for name, part in schema.items() if isinstance(schema, Mapping) else ():
        yield from _parts(part, f"{place}.{name}", name)
    for number, part in enumerate(schema) if isinstance(schema, list) else ():
        yield from _parts(part, f"{place}[{number}]")


def _place_of(schema: Any, error: str) -> tuple[str, Any]:
    """Returns the part of a schema that an error of llguidance names by its keyword or value, or all of it."""

    def is_named(key: str, part: Any) -> bool:
        by_value = isinstance(part, str) and (error.endswith(f": {part}") or f"'{part.removeprefix('#')}'" in error)
        return by_value or (bool(key) and f'"{key}"' in error)

    return next(((place, part) for place, key, part in _parts(schema) if is_named(key, part)), ("$", schema))
