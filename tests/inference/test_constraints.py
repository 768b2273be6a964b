"""Answers that match a JSON schema, a regular expression or one of several texts, alone and beside free ones."""

import json
import logging
import re
import time

import jsonschema
import numpy as np
import pytest

import vl3_jax as vl3
from support.random_schemas import random_schema
from vl3_jax.cli import generation_flags
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError, RunError
from vl3_jax.inference import decode_call
from vl3_jax.inference.constraint_config import ConstraintConfig
from vl3_jax.inference.token_masks import free_masks, mask_words, unpack_masks

pytestmark = pytest.mark.usefixtures("fast_compile")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PATTERNS = [
    r"\d{4}-\d{2}-\d{2}",
    "(yes|no)",
    r"[A-Z][a-z]{2,5}( [A-Z]\.)?",
    "ä{2}[ö-ü]",
    r"\[\d{1,3}(, \d{1,3}){3}\]",
    "x*y",
]
CHOICES = [
    ("yes", "no"),
    ("a red bag", "a red bag with a dog", "猫"),
    ('"quoted"', "back\\slash", "two\nlines"),
    ("one",),
]


@pytest.fixture(scope="module")
def model():
    model = vl3.load("nano")
    model.engine.reserve(rows=4, slots=2048)  # so that all tests share their programs
    return model


def question(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("seed", range(4))
def test_schemas(model, seed):
    schema = random_schema(np.random.default_rng([seed, 7]), 2)
    answer = model.answer(question("Describe the image."), json_schema=schema)
    jsonschema.validate(json.loads(answer.text), schema)
    assert (answer.finish_reason, answer.matches, answer.warnings) == ("stop", True, [])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions(model, pattern):
    answer = model.answer(question("What time is it?"), regex=pattern, temperature=0.8, seed=3)
    assert re.fullmatch(pattern, answer.text)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("choices", CHOICES)
def test_choices(model, choices):
    answers = {model.chat("What is it?", choices=choices, temperature=2.0, seed=seed) for seed in range(6)}
    assert answers <= set(choices)


def test_a_schema_may_be_text_or_a_class(model):
    class Size:
        @staticmethod
        def model_json_schema():
            return {"type": "object", "properties": {"width": {"enum": [1, 2]}}, "required": ["width"]}

    assert model.chat("How wide?", json_schema=json.dumps(PERSON)) == model.chat("How wide?", json_schema=PERSON)
    assert json.loads(model.chat("How wide?", json_schema={**Size.model_json_schema(), "additionalProperties": False}))
    assert json.loads(model.chat("How wide?", json_schema=Size))["width"] in (1, 2)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.9, "top_p": 0.8, "top_k": 9}]
)
def test_what_runs_ahead_is_what_a_mask_for_each_token_gives(model, sampling, monkeypatch):
    """Free and constrained rows share calls; each answer is that of its row alone with a mask before every token."""
    free, together = question("What is shown?"), []
    requests = [
        (free, {"max_new_tokens": 30}),
        (question("How old is Bob?"), {"json_schema": PERSON}),
        (question("The bag is red. Is the bag red?"), {"regex": "The bag is .{3,9}\\."}),
        (question("When?"), {"choices": ("from 2.0 to 4.0 s", "never")}),
    ]
    answering = [model.submit(messages, **settings, **sampling) for messages, settings in requests]
    together = [answer.result().token_ids for answer in answering]
    monkeypatch.setattr(decode_call, "_MOST_AHEAD", 1)
    alone = [model.answer(messages, **settings, **sampling).token_ids for messages, settings in requests]
    assert together == alone


def test_nothing_is_compiled_for_a_constraint(model):
    model.answer(question("What is shown?"), max_new_tokens=4)
    before = model.engine.compiled_programs
    model.answer(question("What is shown?"), choices=["yes", "no"])
    assert model.engine.compiled_programs == before


def test_an_answer_that_is_cut_off_says_so(model, caplog):
    """With too few tokens for any answer; with enough for one, see the next test."""
    answer = model.answer(question("Who?"), json_schema=PERSON, max_new_tokens=5)
    assert (answer.finish_reason, answer.matches) == ("length", False)
    with caplog.at_level(logging.WARNING):
        text = model.chat("Who?", json_schema=PERSON, max_new_tokens=5)
        assert "".join(model.chat("Who?", json_schema=PERSON, max_new_tokens=5, stream=True)) == text
    assert [record.message for record in caplog.records] == answer.warnings * 2
    assert "before it matches" in answer.warnings[0]


ENDLESS = [
    {"type": "object"},
    {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": ["no", "yes"]}}, "required": ["a", "b"]},
    {"type": "string", "pattern": "^(ab|cd)+-[0-9]{4}$"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
    {
        "$defs": {
            "tree": {"type": "object", "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
        },
        "$ref": "#/$defs/tree",
    },
]


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_an_answer_is_led_to_its_end_while_there_are_tokens(model, schema, temperature):
    answer = model.answer(question("Talk."), json_schema=schema, max_new_tokens=40, temperature=temperature)
    jsonschema.validate(json.loads(answer.text), schema)
    assert answer.matches
    assert len(answer.token_ids) <= 40
    assert (answer.finish_reason == "length") == bool(answer.warnings)


@pytest.mark.parametrize("pattern", ["[a-z]*[0-9]", "[a-z]+@[a-z]+[.]com", "(a|b)*c{3}", "[a-z ]+"])
def test_a_regular_expression_is_led_to_its_end(model, pattern):
    answer = model.answer(question("Talk."), regex=pattern, max_new_tokens=20, temperature=3.0)
    assert re.fullmatch(pattern, answer.text)
    assert answer.matches


def test_numbers_end(model):
    schema = {"type": "array", "items": {"type": "number", "minimum": -0.51}, "minItems": 2, "maxItems": 2}
    for seed in range(3):
        text = model.chat("1 1 1 1 1 1", json_schema=schema, max_new_tokens=100, temperature=1.0, seed=seed)
        jsonschema.validate(json.loads(text), schema)
        assert len(text) < 60
    assert json.loads(model.chat("?", json_schema={"type": "string", "pattern": "^[0-9]{30}$"})).isdigit()


@pytest.mark.slow  # for a program of its own
def test_logprobs_are_of_the_free_distribution(model):
    messages = question("The bag is red. What colour is the bag?")
    (free,), (bound,) = (
        model.answer(messages, logprobs=3, max_new_tokens=1, **constraint).logprobs
        for constraint in ({}, {"choices": ["zz"]})
    )
    assert free == bound


REFUSED = [
    ({"json_schema": {"type": "strin"}}, "json_schema at $.type is 'strin'"),
    (
        {"json_schema": {"type": "object", "properties": {"a": {"type": "array", "minItems": "two"}}}},
        "json_schema at $.properties.a.minItems is 'two'",
    ),
    ({"json_schema": {"properties": {"a": {"not": {"const": 1}}}}}, "json_schema at $.properties.a.not is"),
    (
        {"json_schema": {"properties": {"a": {"$ref": "#/nowhere"}}}},
        "json_schema at $.properties.a.$ref is '#/nowhere'",
    ),
    ({"json_schema": {"items": [{"type": "string", "format": "x"}]}}, "json_schema at $"),
    (
        {"json_schema": {"properties": {"a": {"type": "string", "format": "x"}}}},
        "json_schema at $.properties.a.format is",
    ),
    ({"json_schema": {"enum": [1, 2**60]}}, "json_schema at $.enum[1] is 1152921504606846976; an integer beyond 2^53"),
    ({"json_schema": '{"type": \n "object",}'}, "json_schema:2: not valid JSON"),
    ({"json_schema": '{"a": 1, "a": 2}'}, "occurs twice"),
    ({"json_schema": [1]}, "give a JSON object"),
    ({"json_schema": {"const": float("nan")}}, "it is not JSON"),
    ({"regex": "(a"}, "regex is '(a'; that is not a regular expression"),
    ({"regex": "(?=a)b"}, "regex is '(?=a)b'"),
    ({"regex": ""}, "regex is ''"),
    ({"regex": "a\ud800"}, "regex is 'a"),
    ({"choices": ["a\ud800"]}, "choices is ('a"),
    ({"json_schema": {"const": "a\ud800"}}, "json_schema at $"),
    ({"json_schema": json.loads('{"items":' * 100 + "{}" + "}" * 100)}, "nested more than 64 levels deep"),
    ({"regex": r"[^\s\S]"}, "no text matches it"),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable schema"),
    ({"choices": []}, "choices is []; give at least one text"),
    ({"choices": ["a", ""]}, "none of them empty"),
    ({"choices": "yes"}, "give at least one text"),
    ({"regex": "a", "choices": ["a"]}, "leave one of them out"),
    ({"regex": "a", "stop": ["b"]}, "a constraint says where the answer ends"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_wrong_constraint_is_refused_before_the_model_runs(model, settings, message):
    with pytest.raises(InputError) as refused:
        model.chat("Who?", images=["nowhere.png"], **settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regex", "(a"], "--regex is '(a'"),
        (["--choices", "a,,b"], "--choices is ('a', '', 'b')"),
        (["--json-schema", "{file}"], "--json-schema at $.properties.my_name.type is 'strin'"),
        (["--json-schema", "{folder}/nowhere.json"], "nowhere.json: cannot be read"),
    ],
)
def test_flags_are_refused_in_one_line(flags, message, tmp_path, capsys):
    file = tmp_path / "schema.json"
    file.write_text('{"properties": {"my_name": {"type": "strin"}}}')
    flags = [flag.format(file=file, folder=tmp_path) for flag in flags]
    assert main(["ask", "--model", "nowhere", *flags, "Who?"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_command_answers_by_schema_and_choices(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation_flags, "load_model", lambda arguments: model)
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(PERSON))
    assert main(["ask", "--model", "nano", "--json-schema", str(file), "Who?"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), PERSON)
    assert main(["ask", "--model", "nano", "--choices", "yes, no", "Is it?"]) == 0
    assert capsys.readouterr().out.strip() in ("yes", "no")
    assert main(["ask", "--model", "nano", "--json-schema", str(file), "--max-new-tokens", "4", "Who?"]) == 0
    assert "vl3 ask: warning: max_new_tokens cuts the answer off" in capsys.readouterr().err


def test_a_constraint_that_fails_ends_its_own_answer(model, monkeypatch):
    bad = model.submit(question("Who?"), choices=["a"])
    good = model.submit(question("What?"), max_new_tokens=3)

    def fails(mask: np.ndarray) -> None:
        raise RunError("the constraint of an answer cannot be followed: too complex")

    monkeypatch.setattr(bad.generation.request.constraint, "write_mask", fails)
    assert len(good.result().token_ids) <= 3
    with pytest.raises(RunError, match="too complex"):
        bad.result()


def test_masks():
    allowed = np.random.default_rng(0).random((2, 70)) < 0.5
    packed = np.packbits(np.pad(allowed, ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.uint32)
    assert packed.shape == (2, mask_words(70))
    np.testing.assert_array_equal(unpack_masks(packed, 70), allowed)
    assert unpack_masks(free_masks(3, 70), 70).all()


def test_a_configuration_is_a_key():
    assert hash(ConstraintConfig(json_schema=PERSON)) == hash(ConstraintConfig(json_schema=json.dumps(PERSON)))
    assert ConstraintConfig().is_free


@pytest.mark.slow
def test_two_hundred_random_schemas(model):
    """Each answer is valid, greedy and sampled; prints the speed with and without constraints."""
    rng = np.random.default_rng(26)
    schemas = [random_schema(rng) for _ in range(200)]
    model.engine.reserve(rows=8)
    for sampling in ({}, {"temperature": 1.0}):
        model.answer_batch([question("warm up")] * 8, max_new_tokens=16, choices=["a", "b"], **sampling)
        answering = [
            model.submit(question("Describe it."), streams=False, json_schema=schema, seed=seed, **sampling)
            for seed, schema in enumerate(schemas)
        ]
        start = time.perf_counter()
        answers = [answer.result() for answer in answering]
        seconds = time.perf_counter() - start
        for schema, answer in zip(schemas, answers, strict=True):
            jsonschema.validate(json.loads(answer.text), schema)
            assert answer.matches
        tokens = sum(len(answer.token_ids) for answer in answers)
        ended = sum(answer.finish_reason == "stop" for answer in answers)
        print(f"{sampling}: {ended} of 200 ended by themselves, {tokens / seconds:.0f} tokens/s constrained")
    # A text that the model copies, so that the answers are long.
    free = [model.submit(question("Copy: " + "a red bag " * 8), streams=False, max_new_tokens=64) for _ in range(64)]
    start = time.perf_counter()
    tokens = sum(len(answer.result().token_ids) for answer in free)
    print(f"{tokens / (time.perf_counter() - start):.0f} tokens/s free")


@pytest.mark.slow
def test_many_regular_expressions_and_choices(model):
    model.engine.reserve(rows=8)
    rng = np.random.default_rng(1)
    for seed in range(100):
        pattern = str(rng.choice(PATTERNS))
        assert re.fullmatch(pattern, model.chat("What?", regex=pattern, temperature=1.0, seed=seed))
        choices = [f"option {number}" * int(rng.integers(1, 4)) for number in range(int(rng.integers(1, 40)))]
        assert model.chat("Which?", choices=choices, temperature=1.0, seed=seed) in choices
