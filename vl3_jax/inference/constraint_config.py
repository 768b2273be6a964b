"""What an answer must match: a JSON schema, a regular expression, or one of several texts."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import SettingError, printable
from vl3_jax.json_file import parse_json

# A schema is answered on one line, as `json.dumps` writes: white space of its own choice would be without end.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


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
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise SettingError(given[1], getattr(self, given[1]), f"{given[0]} is given too; leave one of them out")
        if self.choices is not None:
            is_list = isinstance(self.choices, list | tuple)
            if not is_list or not self.choices or not all(isinstance(text, str) and text for text in self.choices):
                raise SettingError("choices", self.choices, "give at least one text, none of them empty")
            object.__setattr__(self, "choices", tuple(self.choices))
        if self.regex is not None and not (isinstance(self.regex, str) and self.regex):
            raise SettingError("regex", self.regex, "give a regular expression")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema(self.json_schema))
        if given and (problem := self._problem()):
            raise problem

    @property
    def is_free(self) -> bool:
        """Whether nothing constrains the answer."""
        return self.json_schema is None and self.regex is None and self.choices is None

    def grammar(self) -> str:
        """Returns the grammar of the answer in the form of llguidance.

        Raises:
          ValueError: Nothing constrains the answer.
        """
        from llguidance import LLMatcher

        if self.json_schema is not None:
            return LLMatcher.grammar_from_json_schema(str(self.json_schema), overrides=_JSON_OPTIONS)
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choices is not None:
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_quoted, self.choices))}")
        raise ValueError("a free answer has no grammar")

    def _problem(self) -> SettingError | None:
        """Returns what is wrong with the constraint, with its place in a schema."""
        from llguidance import LLMatcher

        schema = None if self.json_schema is None else json.loads(str(self.json_schema))
        if schema is not None and (problem := _schema_problem(schema)):
            return problem
        error = LLMatcher.validate_grammar(self.grammar())
        if not error:
            return None
        reason = " ".join(error.removeprefix("Lexer Error:").split())
        if schema is not None:
            place, part = _place_of(schema, error)
            return SettingError(f"json_schema at {place}", part, f"it cannot be answered: {reason}")
        if self.regex is not None:
            return SettingError("regex", self.regex, f"that is not a regular expression that can be answered: {reason}")
        return SettingError("choices", self.choices, reason)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(value: Any) -> str:
    """Returns a schema as JSON text.

    Raises:
      InputError: The text is not JSON; names the line.
      SettingError: The value is no schema.
    """
    if hasattr(value, "model_json_schema"):  # a class of pydantic
        value = value.model_json_schema()
    if isinstance(value, str):
        value = parse_json(value.encode(errors="surrogatepass"), "json_schema", unique=True)
    if not isinstance(value, Mapping):
        raise SettingError("json_schema", value, 'give a JSON object, such as {"type": "object", "properties": {...}}')
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingError("json_schema", value, f"it is not JSON ({error})") from None


def _schema_problem(schema: Mapping[str, Any]) -> SettingError | None:
    """Returns where a schema breaks the rules of JSON schemas."""
    import jsonschema

    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    error = jsonschema.exceptions.best_match(validator(validator.META_SCHEMA).iter_errors(schema))
    if error is None:
        return None
    return SettingError(f"json_schema at {error.json_path}", error.instance, printable(error.message))


def _place_of(schema: Any, error: str, place: str = "$") -> tuple[str, Any]:
    """Returns the innermost part of a schema that an error of llguidance names by its keywords, or all of it."""
    if isinstance(schema, Mapping):
        for key, part in schema.items():
            found = _place_of(part, error, f"{place}.{key}")
            if found[0] != f"{place}.{key}" or f'"{key}"' in error:
                return found
    elif isinstance(schema, list):
        for number, part in enumerate(schema):
            found = _place_of(part, error, f"{place}[{number}]")
            if found[0] != f"{place}[{number}]":
                return found
    return place, schema
