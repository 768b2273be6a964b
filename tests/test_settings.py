"""Settings: each is declared once, and survives the way through configurations, JSON and the command line."""

import argparse
import ast
import dataclasses
import importlib.util
import json
import math
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.mixtures import MixtureConfig
from vl3_jax import config_file, config_tree
from vl3_jax.cli import settings_flags
from vl3_jax.errors import InputError, SettingError
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.inference import answer_settings
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.planning.plan_serving import Workload
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.training import run_config
from vl3_jax.training.optimizer import OptimizerConfig
from vl3_jax.training.run_config import RunConfig

ROOT = pathlib.Path(__file__).parents[1]
VARIANTS = ["stage1:2b", "stage2:7b", "stage4:2b,mock", "finetune:image", "finetune:lora,mock", "nano:0", "nano:4"]


def nested(cls):
    """The dataclass and those of its fields."""
    inner = [kind for kind in config_tree.types(cls).values() if dataclasses.is_dataclass(kind)]
    return [cls, *(found for kind in inner for found in nested(kind))]


DECLARATIONS = [*nested(RunConfig), DatasetSpec, SamplingConfig, FrameSamplingOptions, QuestionSelection, Workload]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_survives_json_and_config_dict(name):
    config = run_config.load(name)
    assert config_tree.from_tree(RunConfig, json.loads(json.dumps(config_tree.to_tree(config)))) == config
    assert config_tree.from_tree(RunConfig, config_tree.to_config_dict(config)) == config


@given(
    threshold=st.one_of(st.none(), st.floats(0.01, 1)),
    rates=st.dictionaries(st.sampled_from(["vision", "projector", "llm"]), st.floats(0, 1), min_size=1),
    names=st.lists(st.text("abc", min_size=1), unique=True),
    patterns=st.lists(st.tuples(st.from_regex("[ab/]*([.][*])?", fullmatch=True), st.sampled_from(["vision", "llm"]))),
)
def test_round_trip(threshold, rates, names, patterns):
    datasets = {name: DatasetSpec(name, (f"{name}.jsonl",), size=len(name)) for name in names}
    mixture = MixtureConfig(prune_threshold=threshold, datasets=datasets)
    config = RunConfig("tiny", OptimizerConfig(rates, groups=tuple(patterns)), mixture)
    tree = config_tree.to_tree(config)
    assert config_tree.from_tree(RunConfig, json.loads(json.dumps(tree))) == config
    assert all("name" not in dataset for dataset in tree["data"]["datasets"].values())


def test_changes_reach_the_dataclass():
    changes = ["data.prune_threshold=0", "data.datasets.LLaVA-SFT-665K.weight=2", "optimizer.clip=0", "mesh.fsdp=4"]
    config = run_config.load("stage4:2b", changes)
    assert config.data.prune_threshold is None
    assert config.data.datasets["LLaVA-SFT-665K"].weight == 2.0
    assert (config.optimizer.clip, config.mesh.fsdp) == (0.0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.fps=-1"], "data.fps is -1.0; give a number from 1e-06 up to 1000"),
        (["data.image_merge=3"], "image_merge is 3; use one of 1, 2"),
        (["optimizer.kind=sgd"], "optimizer.kind is 'sgd'; use one of adamw, muon"),
        (["optimizer.warmup_ratio=2"], "warmup_ratio is 2.0"),
        (["data.preprocess=mine"], "preprocess is 'mine'; use one of official, native"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run_config.load("stage1", changes)


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match=r"mesh\.pipeline: no such setting: .*context, data, fsdp, tensor"):
        config_tree.from_tree(RunConfig, config_tree.to_tree(run_config.load("stage1")) | {"mesh": {"pipeline": 2}})
    with pytest.raises(InputError, match=r"^model: no value"):
        config_tree.from_tree(RunConfig, {"optimizer": {"learning_rates": {}}, "data": {}})
    with pytest.raises(InputError, match="no such setting: 'axis'"):
        config_tree.replace(run_config.load("stage1"), {"mesh.axis": 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage9", "stage9: no such configuration; there are data/stage1, "),
        ("stage4:3b", "no variant '3b' of this configuration; there are 2b, 7b, mock"),
        ("stage4:2b,7b", "no variant '2b,7b'"),
        ("nano:5", "there are 0, 1, 2, 3, 4, mock"),
        ("data/stage1", "not the configuration of a training run"),
    ],
)
def test_names_that_are_none_are_refused(name, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run_config.load(name)


def test_every_configuration_of_the_package_loads():
    for name in config_file.names():
        assert config_file.load(name)


@pytest.mark.parametrize("cls", DECLARATIONS, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_description(cls):
    missing = {field.name for field in dataclasses.fields(cls)} - set(config_tree.descriptions(cls))
    assert not missing


def test_flags_have_type_choices_and_default_of_the_declaration():
    parser = argparse.ArgumentParser()
    settings_flags.add(parser, ProcessorConfig, {"fps": "--fps", "preprocess": "--preprocess"})
    parsed = parser.parse_args(["--fps", "2"])
    assert settings_flags.given(parsed, ProcessorConfig) == {"fps": 2.0}
    assert "(default: 1)" in parser.format_help()
    assert "{official,native}" in parser.format_help()


def test_keywords_reach_their_dataclass():
    keywords = {"fps": 2, "max_visual_tokens": 99, "start": 1.5, "top_k": 3, "prune": False, "end": None}
    settings = answer_settings.resolve(keywords, SamplingConfig(repetition_penalty=1.1), ProcessorConfig())
    assert settings.sampling == SamplingConfig(top_k=3, repetition_penalty=1.1)
    assert settings.processor == ProcessorConfig(fps=2, max_tokens=99, prune_threshold=None)
    assert settings.video == {"start": 1.5, "fps": 2}
    assert (settings.allow_remote, resolve(allow_remote=True).allow_remote) == (False, True)
    with pytest.raises(InputError, match="unknown setting 'fsp'; known are"):
        resolve(fsp=1)


def resolve(**keywords):
    return answer_settings.resolve(keywords, SamplingConfig(), ProcessorConfig())


NUMBERS = ("temperature", "top_p", "repetition_penalty", "fps", "prune_threshold", "start", "end")
INTEGERS = ("max_new_tokens", "top_k", "seed", "logprobs", "max_frames", "max_visual_tokens", "image_merge")


@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, True, "1", [1], 10**400, 2**64 - 1, 2**32, 1.5])
def test_every_setting_is_applied_or_refused_under_its_own_name(name, value):
    if value == 1.5 and name in NUMBERS and name != "top_p":
        assert resolve(**{name: value})
        return
    with pytest.raises(SettingError, match=f"^{name} is ") as error:
        resolve(**{name: value})
    assert len(str(error.value)) < 400
    assert (error.value.name, type(error.value.value)) == (name, type(value))


def literal_defaults(declarations):
    """{(name, default)} of the declared settings whose default says more than 'nothing'."""
    fields = [field for cls in declarations for field in dataclasses.fields(cls)]
    trivial = (None, "", 0, 1, False, True, ())
    return {(f.name, f.default) for f in fields if f.default is not dataclasses.MISSING and f.default not in trivial}


def named_constants(tree):
    """Pairs of a name and the constant that a module gives it: keywords, parameters, dict entries, flags."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
            yield node.arg.split("__")[-1], node.value.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    yield str(key.value).split(".")[-1], value.value
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flags = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            for keyword in node.keywords:
                if flags and keyword.arg == "default" and isinstance(keyword.value, ast.Constant):
                    yield str(flags[0]).lstrip("-").replace("-", "_"), keyword.value.value


@pytest.mark.parametrize(
    ("folder", "declarations"),
    [
        ("configs", [*nested(RunConfig), DatasetSpec]),
        ("vl3_jax/cli", DECLARATIONS),
        ("vl3_jax/inference", DECLARATIONS),
        ("launch", DECLARATIONS),
    ],
)
def test_no_default_stands_twice(folder, declarations):
    declared = literal_defaults(declarations)
    assert {("max_frames", 180), ("warmup_ratio", 0.03), ("kind", "adamw"), ("patches", 40_960)} <= declared
    for path in sorted((ROOT / folder).rglob("*.py")):
        again = declared & {pair for pair in named_constants(ast.parse(path.read_text())) if pair[1].__hash__}
        assert not again, f"{path}: {again}"


def test_help_texts_have_no_defaults_of_their_own():
    for path in sorted((ROOT / "vl3_jax" / "cli").glob("*.py")):
        assert not re.findall(r"\(default:? [\d.]+\)", path.read_text()), path


def test_the_page_of_settings_is_current():
    spec = importlib.util.spec_from_file_location("generate_settings", ROOT / "docs" / "generate_settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/generate_settings.py"


def test_no_other_page_has_a_table_of_defaults():
    names = {name.split(".")[-1] for cls in DECLARATIONS for name in config_tree.types(cls)}
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name != "settings.md":
            rows = re.findall(r"^\| `([\w.]+)` \| `?[\d.]+`? \|", path.read_text(), re.MULTILINE)
            assert not {row.split(".")[-1] for row in rows} & names, path
