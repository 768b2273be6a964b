"""The settings of a training run. Files of `configs/` call `training_config` with what their run is about."""

import json
import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.mixtures import Group, mixture
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax import config_file
from vl3_jax.errors import InputError
from vl3_jax.training import lora
from vl3_jax.training.groups import MODULES, WITH_LORA

# A run that is gone on with may change these: they move work around, but do not change what is learned.
FREE = (
    "mesh",
    "cpu_devices",
    "expect_devices",
    "remat",
    "loader",
    "log",
    "checkpoint",
    "eval",
    "profile",
    "batch.grad_accum_steps",
)
MOCK = "mock"
MOCK_RATE = 1e-3
RECORD = "config.json"
DRAWN = "synthetic://train/stage3?count=400"  # samples that are drawn when they are read


def training_config(
    variant: str, *, model: str, data: str | os.PathLike | ConfigDict, learning_rates: dict[str, float], **settings: Any
) -> ConfigDict:
    """All settings of a run; what is not given is the paper's, or has the value that suits most.

    Args:
      variant: "" or "mock": a tiny model on drawn data, for a laptop.
      model: a preset; must be what `start` holds.
      data: a mixture (`data_pipelines.mixtures.mixture`), or the file of one.
      rates: peak learning rate of each group of parameters, 0 for a frozen one: "vision", "projector", "llm", and
        "lora" where there are adapters.
      **settings: others, with `__` for the dot: `optimizer__clip=0.0`.

    Raises:
      InputError: an unknown variant or setting.
    """
    config = ConfigDict(
        {
            "model": model,
            "init_from": "",  # checkpoint of any kind that training begins from
            "random_init": False,  # begin from random weights instead
            "tokenizer": "",  # folder or tokenizer.json; "": that of `start`
            "seed": 42,
            "dtype": "bfloat16",  # of activations
            "param_dtype": "float32",  # of weights that learn
            "frozen_dtype": "bfloat16",  # of weights that do not
            "remat": {"vision": "full", "text": "full"},  # names of model/remat.py
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},  # -1: what is left
            "cpu_devices": 0,  # into how many a CPU is split, where there is nothing else; 0: one
            "expect_devices": 0,  # of all hosts together; a job that finds another number ends; 0: any
            "batch": {
                "samples": 128,  # of a step on average; decides the rows of a step where they are not given
                "rows": 0,  # of a step, on all hosts; 0: from `samples`, rounded to what the mesh divides
                "grad_accum_steps": 0,  # parts of a step that go one after another; 0: a device has one row at a time
            },
            "epochs": 1,
            "steps": 0,  # stop after so many; 0: when the epochs are over
            "optimizer": {
                "kind": "adamw",  # or "muon", for tiny models
                "learning_rates": {name: float(rate) for name, rate in learning_rates.items()},
                "groups": WITH_LORA if "lora" in learning_rates else MODULES,  # (pattern of paths, group), in order
                "warmup_ratio": 0.03,  # of all steps; then half a cosine to 0
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip": 1.0,  # of the gradient's global norm; 0: none
                "first_moment_dtype": "float32",  # or "bfloat16"
            },
            "lora": {"rank": 0, "alpha": 16.0, "patterns": lora.LLM},  # rank 0: whole matrices are trained
            "data": data if isinstance(data, ConfigDict) else config_file.load(data),
            "loader": {"workers": 0, "threads": 0, "bad_share": 0.05},  # threads 0: as many as processors
            "eval": {"annotations": (), "media": "", "every": 0, "steps": 0},  # steps 0: all of it
            "checkpoint": {"every": 1000, "keep": 2},
            "log": {"every": 10, "tensorboard": True},
            "profile": {"start": 10, "steps": 0},
            "mock": False,
        }
    )
    for key, value in settings.items():
        config_file.set_value(config, key.replace("__", "."), value)
    if variant == MOCK:
        _shrink(config)
    elif variant:
        raise InputError(f"no variant {variant!r} of this configuration; there is {MOCK!r}")
    return config


def _shrink(config: ConfigDict) -> None:
    """Tiny shapes, drawn data and a random start, so that the whole path runs anywhere in a minute."""
    config.mock = True
    config.model = "tiny"
    config.random_init = True
    config.dtype = config.frozen_dtype = "float32"
    config.remat = ConfigDict({"vision": "none", "text": "none"})
    config.batch.rows = 8
    config.batch.grad_accum_steps = 1
    config.data.datasets = mixture([Group("drawn", 0, ["drawn"])]).datasets
    config.data.datasets.drawn.annotations = (DRAWN,)
    config.tokenizer = str(TOKENIZER)
    config.steps = 20
    config.checkpoint.every = 10
    config.log.every = 5
    for (
        name,
        rate,
    ) in config.optimizer.learning_rates.items():  # at the rates of a trained model a random one learns nothing
        config.optimizer.learning_rates[name] = MOCK_RATE if rate else 0.0
    for name, value in {
        "length": 512,
        "patches": 512,
        "vision_tokens": 256,
        "samples": 8,
        "max_tokens": 64,
        "min_tokens": 4,
        "max_frames": 8,
        "max_frame_patches": 256,
    }.items():
        config.data[name] = value


def record(config: ConfigDict, rows: int) -> dict[str, Any]:
    """What a workdir remembers of its run: the settings, and the rows of a step that they came to."""
    return {"config": json.loads(config.to_json()), "rows": rows}


def check_same_run(workdir: pathlib.Path, found: dict[str, Any], config: ConfigDict) -> None:
    """Compares the record of a workdir with a configuration. InputError names the first difference that matters."""
    before, now = _flat(found["config"]), _flat(json.loads(config.to_json()))
    for key in [*before, *now]:
        if any(key == free or key.startswith(free + ".") for free in FREE):
            continue
        if before.get(key) != now.get(key):
            raise InputError(
                f"{workdir}: belongs to a run with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "go on with the same settings, or give another --workdir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
