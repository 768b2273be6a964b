"""Groups of parameters: full coverage, order of the patterns, and trainable and frozen halves."""

import jax
import pytest
from tiny import start_params

from vl3_jax.errors import InputError
from vl3_jax.training.groups import MODULES, WITH_LORA, assign, flatten, merge, split, trainable_mask
from vl3_jax.training.lora import add_adapters

PARAMS = start_params()


def test_the_modules_cover_the_model():
    groups = flatten(assign(PARAMS, MODULES))
    assert list(groups) == list(flatten(PARAMS))
    assert all(path.split("/")[0] == group for path, group in groups.items())


def test_the_first_match_wins():
    patterns = [(r".*/bias", "biases"), (r"llm/embed/.*", "embedding"), *MODULES]
    groups = flatten(assign(PARAMS, patterns))
    assert groups["vision/layers/attn/q/bias"] == "biases"
    assert groups["llm/embed/embedding"] == "embedding"
    assert groups["llm/norm/scale"] == "llm"


def test_adapters_have_a_group_of_their_own():
    params = jax.eval_shape(lambda: add_adapters(PARAMS, jax.random.key(0), rank=2))
    groups = flatten(assign(params, WITH_LORA))
    assert groups["llm/layers/mlp/up/kernel/a"] == groups["llm/layers/mlp/up/kernel/b"] == "lora"
    assert groups["llm/layers/mlp/up/kernel/base"] == "llm"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (MODULES[:2], "parameter llm/embed/embedding is in no group"),
        ([("visio", "vision"), *MODULES[1:]], "is in no group"),  # a pattern must match the whole path
        ([*MODULES, (r"lm/.*", "typo")], "group 'typo': no parameter is left for 'lm/.*'"),
        ([(".*", "all"), (r"llm/.*", "llm")], "group 'llm': no parameter is left"),
        (WITH_LORA, "group 'lora': no parameter is left"),
        ([("(", "broken")], "group 'broken': '\\(' is not a regular expression"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns, message):
    with pytest.raises(InputError, match=message):
        assign(PARAMS, patterns)


@pytest.mark.parametrize(
    ("learning_rates", "message"),
    [
        ({"vision": 1, "projector": 1}, "group 'llm' has no learning rate"),
        ({"vision": 1, "projector": 1, "llm": 1, "lora": 1}, "'lora', which is no group; the groups are llm, proj"),
        ({"vision": -1, "projector": 1, "llm": 1}, "group 'vision' has the learning rate -1"),
        ({"vision": None, "projector": 0, "llm": 0.0}, "every group is frozen"),
    ],
)
def test_learning_rates_that_do_not_fit_are_refused(learning_rates, message):
    with pytest.raises(InputError, match=message):
        trainable_mask(assign(PARAMS, MODULES), learning_rates)


def test_merge_inverts_split():
    params = add_adapters(PARAMS, jax.random.key(0), rank=2)
    learning_rates = {"vision": None, "projector": 1e-3, "llm": 0, "lora": 1e-4}
    mask = trainable_mask(assign(params, WITH_LORA), learning_rates)
    trainable, frozen = split(params, mask)
    trainable_paths = {path for path, is_trainable in flatten(mask).items() if is_trainable}
    assert trainable_paths == {
        path for path in flatten(params) if path.startswith("projector") or path[-2:] in ("/a", "/b")
    }
    assert set(flatten(trainable)) == trainable_paths
    assert not trainable_paths & set(flatten(frozen))
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))
