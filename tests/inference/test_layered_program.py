"""Tests that programs of calls of one layer equal the programs that they are made from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.samples import random_sample, random_visual
from support.tolerances import REORDERED, relative_error
from support.weights import random_params
from vl3_jax.inference import compiled_programs
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.layered_program import LayeredProgram, compile_by_layers
from vl3_jax.inference.program_store import ProgramStore
from vl3_jax.inference.programs import DecodeState, PromptPart, empty_state, prefill
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.model.remat import is_layer
from vl3_jax.model.serving_layout import to_serving

MODEL = VideoLLaMA3(preset("tiny"), serving=True)
PARAMS = to_serving(random_params(MODEL.config), MODEL.config)
pytestmark = pytest.mark.usefixtures("fast_compile")


def part_of_a_prompt(tokens=24) -> PromptPart:
    rng = np.random.default_rng(0)
    shown = rng.standard_normal((1, tokens, MODEL.config.text.hidden_size)).astype(np.float32)
    words = rng.integers(-2, 400, (1, tokens)).astype(np.int32)
    return PromptPart(words, shown, np.array([1, 0, tokens - 3, -1], np.int32))


@functools.cache
def layered_prefill() -> LayeredProgram:
    return compile_by_layers(prefill.trace(MODEL, PARAMS, DecodeState.empty(MODEL, 2, 64), part_of_a_prompt()))


def test_a_part_of_a_prompt_is_read_alike():
    program, part = layered_prefill(), part_of_a_prompt()
    calls = [call.program for call in program.calls]
    assert len(program.programs) == 3
    assert calls == [0, *[1] * MODEL.config.text.num_layers, 2]
    given = empty_state(MODEL, 2, 64)
    states = prefill(MODEL, PARAMS, empty_state(MODEL, 2, 64), part), program(PARAMS, given, part)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for whole, by_layers in zip(*(jax.tree.leaves(state.cache.keys_values) for state in states), strict=True):
        assert relative_error(by_layers, whole) <= REORDERED
    rest = [state.replace(cache=state.cache.replace(keys_values=())) for state in states]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    assert given.cache.keys_values[0].keys.is_deleted()  # it is the new state's
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((PARAMS, states[1])))


def test_it_is_stored_and_loaded(tmp_path):
    store, part = ProgramStore(tmp_path), part_of_a_prompt()
    store.save(layered_prefill(), "prefill")
    loaded = store.load(jax.local_devices()[:1], "prefill")
    states = [program(PARAMS, empty_state(MODEL, 2, 64), part) for program in (layered_prefill(), loaded)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_large_models_on_a_cpu_answer_by_layers(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(compiled_programs, "_LARGE_BYTES", 0)
    keep = lambda traced: compiled.append(compile_by_layers(traced)) or compiled[-1]  # noqa: E731
    monkeypatch.setattr(compiled_programs, "compile_by_layers", keep)
    rng = np.random.default_rng(0)
    sample = random_sample(rng, [random_visual(rng, (1, 6, 10), 1)], text=5)
    request = functools.partial(Request, sample, SamplingConfig(max_new_tokens=12, repetition_penalty=3.0))
    answers = [
        engine.run([request()])[0].tokens
        for engine in (Engine(MODEL, PARAMS, stop_ids=(), programs_folder=tmp_path) for _ in range(2))
    ]
    monkeypatch.setattr(compiled_programs, "_LARGE_BYTES", 2**40)
    whole = Engine(MODEL, PARAMS, stop_ids=()).run([request()])[0].tokens
    assert answers == [whole, whole]
    assert sorted(len(program.programs) for program in compiled) == [1, 3, 3]  # once, and only read the second time


def test_literals_constants_and_results_of_layers():
    table = np.arange(3.0, dtype=np.float32)

    @functools.partial(jax.jit, donate_argnums=1)
    def function(x, state):
        x = x + table
        for _ in range(2):
            x, total = layer(x, 2.0)
        x, total = layer(x, 3.0)
        return {"x": x, "total": total, "zero": jnp.int32(0), "state": state, "table": table + 0 * total}

    def _apply_layer(x, scale):
        return x * scale, x.sum()

    layer = jax.jit(_apply_layer)
    arguments = np.ones(3, np.float32), np.zeros(2, np.float32)
    traced = function.trace(*arguments)
    assert sum(map(is_layer, traced.jaxpr.eqns)) == 3
    program = compile_by_layers(traced)
    assert len(program.programs) == 4  # the layer of another factor is a program of its own
    jax.tree.map(np.testing.assert_allclose, program(*arguments), function(*arguments))


def test_what_lies_between_layers_is_refused():
    def _apply_layer(x):
        return x + 1

    layer = jax.jit(_apply_layer)
    with pytest.raises(ValueError, match="outside of the layers"):
        compile_by_layers(jax.jit(lambda x: layer(2 * layer(x))).trace(np.ones(3)))
