"""The configuration of a training run."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from data_pipelines.loader import BAD_SHARE
from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.mixtures import MixtureConfig
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax import config_file, config_tree
from vl3_jax.config_tree import AMOUNT, CHOICES, COUNT, INT32, LIMITS, REGEX, SEED, SHARE, CheckedSettings, Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.model.remat import POLICIES
from vl3_jax.training import lora
from vl3_jax.training.groups import MODULES, WITH_LORA
from vl3_jax.training.optimizer import OptimizerConfig

# Settings that may change when a run is resumed: they move work around or tell about it, but do not change what is
# learned.
_PLACEMENT = ("mesh", "cpu_devices", "expect_devices", "remat", "loader", "batch.grad_accum_steps")
_OBSERVATION = ("log", "checkpoint", "eval", "profile")
MUTABLE_ON_RESUME = _PLACEMENT + _OBSERVATION
# Where the data lie may change too: what they hold is compared by digests, in the state of the data.
_DATA_PATHS = re.compile(r"data\.(root|datasets\..+\.(annotations|media|index))")
RUN_CONFIG_FILE = "config.json"
MODELS = ("2b", "7b")  # presets of the released models
ANY_SIZE = ("",)  # for `models`: the sizes of the initial weights
MOCK = "mock"
MOCK_LEARNING_RATE = 1e-3  # at the rates of a trained model a random one learns nothing
SYNTHETIC_DATA = "synthetic://train/stage3?count=400"
DTYPES = ("float32", "bfloat16")
_AXIS = Limits(-1, INT32)


@dataclasses.dataclass(frozen=True)
class RematConfig(CheckedSettings):
    """Rematerialisation policies, names of `model/remat.py`.

    Attributes:
      vision: Policy of the tower's layers.
      text: Policy of the decoder's layers.
    """

    vision: str = dataclasses.field(default="full", metadata={CHOICES: tuple(POLICIES)})
    text: str = dataclasses.field(default="full", metadata={CHOICES: tuple(POLICIES)})


@dataclasses.dataclass(frozen=True)
class MeshConfig(CheckedSettings):
    """Size of each mesh axis; one may be -1, which takes all remaining devices.

    Attributes:
      data: Copies of the weights, each with rows of its own.
      fsdp: Devices that share weights and split rows.
      tensor: Devices that split heads and hidden widths.
      context: Devices that split the positions of a row.
    """

    data: int = dataclasses.field(default=1, metadata={LIMITS: _AXIS})
    fsdp: int = dataclasses.field(default=-1, metadata={LIMITS: _AXIS})
    tensor: int = dataclasses.field(default=1, metadata={LIMITS: _AXIS})
    context: int = dataclasses.field(default=1, metadata={LIMITS: _AXIS})

    def __post_init__(self):
        super().__post_init__()
        sizes = vars(self)
        for name, size in sizes.items():
            if size == 0:
                raise SettingError(name, size, "give 1 or more devices, or -1 for all that remain")
        remaining = [name for name, size in sizes.items() if size == -1]
        if len(remaining) > 1:
            raise SettingError(remaining[1], -1, f"only one axis may be -1, and {remaining[0]} is")


@dataclasses.dataclass(frozen=True)
class BatchConfig(CheckedSettings):
    """The size of an optimizer step.

    Attributes:
      samples: Samples of a step on average, which decide its rows where `rows` is 0.
      rows: Rows of a step on all hosts together; 0 derives them from `samples`, rounded to what the mesh divides.
      grad_accum_steps: Microbatches of a step; 0 gives each device one row at a time.
    """

    samples: int = dataclasses.field(default=128, metadata={LIMITS: COUNT})
    rows: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    grad_accum_steps: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})


@dataclasses.dataclass(frozen=True)
class LoraConfig(CheckedSettings):
    """Low-rank adapters.

    Attributes:
      rank: Rank of the adapters; 0 trains whole matrices instead.
      alpha: Scale of the adapters, which count alpha / rank.
      patterns: Regular expressions of the parameter paths that get adapters.
    """

    rank: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0, 65_536)})
    alpha: float = dataclasses.field(default=lora.ALPHA, metadata={LIMITS: Limits(above=0, most=1_000_000)})
    patterns: tuple[str, ...] = dataclasses.field(default=lora.LLM, metadata={REGEX: True})


@dataclasses.dataclass(frozen=True)
class LoaderConfig(CheckedSettings):
    """Reading of training data.

    Attributes:
      workers: Worker processes of each host; 0 reads in threads of the training process.
      threads: Threads of each host; 0 is one for each processor.
      bad_share: Share of bad samples, 0 to 1, above which the run stops.
    """

    workers: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0, 256)})
    threads: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0, 1024)})
    bad_share: float = dataclasses.field(default=BAD_SHARE, metadata={LIMITS: SHARE})


@dataclasses.dataclass(frozen=True)
class EvalConfig(CheckedSettings):
    """The loss on held-out data, and the scores of benchmarks.

    Attributes:
      tasks: Benchmarks to ask, as `vl3 eval --tasks` names them, with commas between them.
      data: Folder of all benchmarks, for tasks that need data.
      questions: Questions of each task; 0 is all, and 200 of a synthetic task.
      annotations: Annotation files of the held-out data; relative paths are below `data.root`, as in training.
      media: Folder or URL of their media, likewise.
      outside, remote: Which other media may be read, as for a data set in training.
      every: Optimizer steps between two evaluations; 0 evaluates after the last step only.
      steps: Batches of an evaluation; 0 is all of the data.
    """

    tasks: str = ""
    data: str = ""
    questions: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    annotations: tuple[str, ...] = ()
    media: str = ""
    outside: bool = False
    remote: bool = False
    every: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    steps: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})

    def __post_init__(self):
        super().__post_init__()
        if not all(self.annotations):
            raise SettingError("annotations", self.annotations, "name each file")
        held_out, asked = ("held-out data", "annotations"), ("benchmarks", "tasks")
        needs = {"media": (held_out,), "steps": (held_out,), "data": (asked,), "questions": (asked,)}
        for name, uses in (needs | {"every": (held_out, asked)}).items():
            if getattr(self, name) and not any(getattr(self, by) for _, by in uses):
                purposes, namers = (" or ".join(words) for words in zip(*uses, strict=True))
                raise SettingError(name, getattr(self, name), f"that is for {purposes}; name them by {namers}")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(CheckedSettings):
    """Checkpoints of a run.

    Attributes:
      every: Optimizer steps between two checkpoints; 0 keeps the last state only.
      keep: Number of newest checkpoints that are kept; 0 keeps all.
      digests: Whether a checksum of each array is saved, by which resuming finds flipped bits.
    """

    every: int = dataclasses.field(default=1000, metadata={LIMITS: AMOUNT})
    keep: int = dataclasses.field(default=2, metadata={LIMITS: AMOUNT})
    digests: bool = False


@dataclasses.dataclass(frozen=True)
class LogConfig(CheckedSettings):
    """Metrics of a run.

    Attributes:
      every: Optimizer steps between two lines of metrics.
      tensorboard: Whether TensorBoard event files are written, too.
    """

    every: int = dataclasses.field(default=10, metadata={LIMITS: COUNT})
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class ProfileConfig(CheckedSettings):
    """A profiler trace.

    Attributes:
      start: First optimizer step of the trace, from 0.
      steps: Optimizer steps of the trace; 0 takes none.
    """

    start: int = dataclasses.field(default=10, metadata={LIMITS: AMOUNT})
    steps: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})

    def check_within(self, total: int) -> None:
        """Raises SettingError if a run of `total` steps ends before its trace does."""
        if self.steps and self.start + self.steps > total:
            advice = f"a trace of {self.steps} steps from there does not end within a run of {total}"
            raise SettingError("profile.start", self.start, advice)


@dataclasses.dataclass(frozen=True)
class RunConfig(CheckedSettings):
    """Everything that decides over a training run; defaults are the paper's where it has any.

    Attributes:
      model: Model preset, which the initial weights must match; empty takes the sizes of `init_from`.
      optimizer: Optimizer and learning rates.
      data: Mixture of data sets, and how records become rows.
      init_from: Checkpoint of any kind with the initial weights.
      random_init: Whether the run starts from random weights instead.
      tokenizer: Tokenizer of random weights: a tokenizer.json, or whatever names a model. Initial weights bring
        their own.
      seed: Seed of the order of samples and of random weights.
      dtype: Type of activations.
      param_dtype: Type of trainable weights.
      frozen_dtype: Type of frozen weights.
      remat: Rematerialisation policies.
      mesh: Device mesh.
      cpu_devices: Devices that a CPU is split into where there is no accelerator; 0 is one.
      expect_devices: Number of devices on all hosts, any other of which ends the job; 0 accepts any.
      batch: Size of a step.
      epochs: Epochs of the run, where `steps` is 0.
      steps: Optimizer steps of the run; 0 ends with the epochs.
      lora: Adapters.
      loader: Reading of data.
      eval: Held-out data.
      checkpoint: Checkpoints.
      log: Metrics.
      profile: Profiler trace.
      mock: Whether this is a tiny model on synthetic data.
    """

    model: str
    optimizer: OptimizerConfig
    data: MixtureConfig
    init_from: str = ""
    random_init: bool = False
    tokenizer: str = ""
    seed: int = dataclasses.field(default=42, metadata={LIMITS: SEED})
    dtype: str = dataclasses.field(default="bfloat16", metadata={CHOICES: DTYPES})
    param_dtype: str = dataclasses.field(default="float32", metadata={CHOICES: DTYPES})
    frozen_dtype: str = dataclasses.field(default="bfloat16", metadata={CHOICES: DTYPES})
    remat: RematConfig = RematConfig()
    mesh: MeshConfig = MeshConfig()
    cpu_devices: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0, 256)})
    expect_devices: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    batch: BatchConfig = BatchConfig()
    epochs: int = dataclasses.field(default=1, metadata={LIMITS: COUNT})
    steps: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    lora: LoraConfig = LoraConfig()
    loader: LoaderConfig = LoaderConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    mock: bool = False


def train_config(
    variant: str,
    data: MixtureConfig | ConfigDict,
    learning_rates: Mapping[str, float],
    models: Sequence[str] = MODELS,
    **settings: Any,
) -> ConfigDict:
    """Builds the configuration of a run, for a file of `configs/` to return.

    Args:
      variant: One of `models`, "mock", or both joined by a comma; the first of `models` where it names none. "mock"
        shrinks the run to a tiny model on synthetic data, for any machine.
      data: The mixture, or the configuration of one.
      learning_rates: Peak learning rate of each group of parameters, 0 for a frozen one: "vision", "projector", "llm",
        and "lora" where there are adapters.
      models: Model presets that this run exists for.
      **settings: Other values, with `__` for the dot: `optimizer__clip=0.0`.

    Raises:
      InputError: An unknown variant.
    """
    model, is_mock = split_variant(variant, models)
    optimizer = OptimizerConfig(
        learning_rates={group: float(rate) for group, rate in learning_rates.items()},
        groups=WITH_LORA if "lora" in learning_rates else MODULES,
    )
    mixture = data if isinstance(data, MixtureConfig) else config_tree.from_tree(MixtureConfig, data, "data.")
    config = RunConfig(model, optimizer, mixture)
    config = config_tree.replace(config, {name.replace("__", "."): value for name, value in settings.items()})
    return config_tree.to_config_dict(apply_mock(config) if is_mock else config)


def split_variant(variant: str, choices: Sequence[str]) -> tuple[str, bool]:
    """Returns the choice that a variant such as "7b,mock" names, by default the first, and whether it is a mock run.

    Raises:
      InputError: The variant names something else, or two choices.
    """
    names = [name for name in variant.split(",") if name]
    chosen = [name for name in names if name != MOCK]
    if len(chosen) > 1 or not set(chosen) <= set(choices):
        known = ", ".join([*choices, MOCK])
        raise InputError(f"no variant {variant!r} of this configuration; there are {known}, or two joined by a comma")
    return (chosen or choices)[0], MOCK in names


def apply_mock(config: RunConfig) -> RunConfig:
    """Returns the run with a tiny model, synthetic data and random weights, so that it runs anywhere in a minute."""
    name, *others = config.data.datasets or ["synthetic"]  # a single data set keeps the name by which it is changed
    dataset = DatasetSpec("synthetic" if others else name, (SYNTHETIC_DATA,), "synthetic", "synthetic")
    rates = config.optimizer.learning_rates
    return config_tree.replace(
        config,
        {
            "mock": True,
            "model": "tiny",
            "init_from": "",
            "random_init": True,
            "tokenizer": str(TOKENIZER),
            "dtype": "float32",
            "frozen_dtype": "float32",
            "remat": RematConfig("none", "none"),
            "batch.rows": 8,
            "batch.grad_accum_steps": 1,
            "steps": 20,
            "checkpoint.every": 10,
            "log.every": 5,
            "optimizer.learning_rates": {group: MOCK_LEARNING_RATE if rate else 0.0 for group, rate in rates.items()},
            "data.datasets": {dataset.name: dataset},
            "data.length": 512,
            "data.patches": 512,
            "data.vision_tokens": 256,
            "data.samples": 8,
            "data.max_tokens": 64,
            "data.min_tokens": 4,
            "data.max_frames": 8,
            "data.max_frame_patches": 256,
        },
    )


def load(name: str | os.PathLike, changes: Sequence[str] = ()) -> RunConfig:
    """Loads the configuration of a run by name or file, after changes; see `config_file.load`."""
    config = config_file.load(name, changes)
    if "optimizer" not in config:
        raise InputError(f"{name}: not the configuration of a training run; a mixture alone is for `vl3 data`")
    return config_tree.from_tree(RunConfig, config)


def check_same_run(workdir: os.PathLike, recorded: Mapping[str, Any], config: RunConfig) -> None:
    """Compares the recorded configuration of a workdir with that of a run.

    Raises:
      InputError: They differ in a setting that may not change; names the first.
    """
    mutable = tuple(f"{name}." for name in MUTABLE_ON_RESUME)
    as_json = json.loads(json.dumps(config_tree.to_tree(config)))
    before, now = flatten_dict(recorded, sep="."), flatten_dict(as_json, sep=".")
    for key in [*before, *now]:
        movable = f"{key}.".startswith(mutable) or _DATA_PATHS.fullmatch(key)
        if before.get(key) != now.get(key) and not movable:
            raise InputError(
                f"{workdir}: belongs to a run with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "resume it with the same settings, or give another --workdir"
            )
