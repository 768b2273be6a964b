"""Requests with different LoRA adapters share a batch, and an int8 cache is as large as planned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl3_jax as vl3
from support.adapters import write_adapter
from support.checkpoints import write_small_checkpoint
from support.samples import random_sample, random_visual
from vl3_jax.checkpoint import open_source
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.inference.memory import Demand, memory_plan
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig

GREEDY = SamplingConfig(max_new_tokens=12, repetition_penalty=2.0)
NAMES = (None, "all", "few")
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def folders(base):
    config = open_source(base).config
    return {
        "all": write_adapter(base.parent / "all", config, rank=2, base=base),
        "few": write_adapter(base.parent / "few", config, ["q_proj", "down_proj"], rank=3, seed=1, base=base),
    }


@pytest.fixture(scope="module")
def model(base, folders):
    loaded = vl3.load(base, adapters=folders)
    loaded.engine.reserve(rows=4, slots=128)
    return loaded


def samples():
    rng = np.random.default_rng(4)
    visuals = [[], [random_visual(rng, (1, 4, 6), 1)]]
    return [random_sample(rng, visual, text=30 - 10 * len(visual)) for visual in visuals]


def test_adapters_in_one_batch_equal_each_alone(model):
    engine, compiled = model.engine, []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    engine.run([Request(sample, GREEDY) for sample in samples()])
    before = engine.compiled_programs
    jax.monitoring.register_event_duration_secs_listener(count)
    engine.forget()
    requests = [Request(sample, GREEDY, adapter=name) for sample in samples() for name in NAMES]
    together = [generation.tokens for generation in engine.run(requests)]
    alone = []
    for request in requests:
        engine.forget()
        alone.append(engine.run([request])[0].tokens)
    jax.monitoring.unregister_event_duration_listener(count)
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == len(requests)
    assert (engine.compiled_programs, compiled) == (before, [])


def test_an_adapter_continues_nothing_that_another_has_read(model):
    model.engine.forget()
    sample = samples()[0]
    reused = [model.engine.run([Request(sample, GREEDY, adapter=name)])[0].reused_tokens for name in (*NAMES, *NAMES)]
    assert reused == [0, 0, 0, *[len(sample.tokens) - 1] * 3]


def test_a_row_that_was_given_back_unread_holds_nothing_of_another_adapter(model):
    engine, sample = model.engine, samples()[0]
    engine.forget()
    engine.run([Request(sample, GREEDY) for _ in range(engine.rows)])
    given_back = [engine.submit(Request(sample, GREEDY, adapter="all")) for _ in range(engine.rows)]
    engine._join()
    for generation in given_back:
        generation.cancel()
    assert engine.run([Request(sample, GREEDY, adapter="all")])[0].reused_tokens == 0


def test_an_answer_is_that_of_the_merged_model(model, folders):
    sample = samples()[0]
    (merged,) = vl3.load(folders["all"]).engine.run([Request(sample, GREEDY)])
    (apart,) = model.engine.run([Request(sample, GREEDY, adapter="all")])
    assert apart.tokens == merged.tokens


def test_an_unknown_adapter_is_refused_before_media_are_read(base, model):
    with pytest.raises(InputError, match="there is no adapter 'other'; loaded are all, few"):
        model.chat("What?", images="missing.png", adapter="other")
    with pytest.raises(InputError, match="there is no adapter 'all'; the model was loaded without any"):
        vl3.load(base).chat("What?", adapter="all")


def test_an_int8_cache_takes_what_is_planned_and_the_command_line_has_both(capsys, base, folders):
    model, question = vl3.load(base, adapters={"mine": folders["all"]}, kv_cache="int8"), "What is there?"
    answer = model.chat(question, max_new_tokens=6, adapter="mine")
    flags = ["ask", "--model", str(base), question, "--max-new-tokens", "6", "--kv-cache", "int8"]
    assert main([*flags, "--adapter", f"mine={folders['all']}"]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    arrays = jax.tree.leaves(model.engine._device._state.cache.keys_values)
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("int8"), jnp.dtype("float32")}
    demand = Demand("float32", kv_cache="int8", slots=model.engine.slots)
    plans = [memory_plan(open_source(base), each) for each in (demand, dataclasses.replace(demand, kv_cache=None))]
    assert plans[0].cache == sum(leaf.nbytes for leaf in arrays) < 0.4 * plans[1].cache
    with pytest.raises(InputError, match="kv_cache is 'int4'"):
        vl3.load(base, kv_cache="int4")


@pytest.mark.parametrize("value", ["all", "=DIR", "all="])
def test_an_adapter_of_the_command_line_has_a_name_and_a_folder(capsys, value):
    with pytest.raises(SystemExit) as refused:
        main(["ask", "--model", "nano", "What?", "--adapter", value])
    assert refused.value.code == 2
    assert "give a name and a folder" in capsys.readouterr().err
