"""Writes docs/settings.md from the declarations of the settings: python docs/generate_settings.py."""

import dataclasses
import pathlib
from typing import Any

from data_pipelines.mixture_dataset import DatasetSpec
from vl3_jax import config_tree
from vl3_jax.inference import answer_settings
from vl3_jax.inference.constraint_config import ConstraintConfig
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.training.run_config import RunConfig

PAGE = pathlib.Path(__file__).with_name("settings.md")
HEAD = """# Settings

Written by `python docs/generate_settings.py` from the dataclasses that declare the settings; a default stands there and
nowhere else.

"""
TRAINING = """## Training runs

`vl3 train`, `vl3 plan` and `vl3 data` change a setting with `--config.NAME=VALUE`. The configurations `stage1` to
`stage4`, `finetune` and `nano` set some of them; `vl3 train` prints what a run uses. A data set of a mixture is
`data.datasets.NAME`, with the settings of the second table.

"""
INFERENCE = """## Answers

Keywords of `ChatModel.chat` and `ChatModel.answer`, and flags of `vl3 ask` and `vl3 chat` (`max_new_tokens` is
`--max-new-tokens`). A checkpoint may have other defaults of its own. `json_schema` (there a file), `regex` and
`choices` are flags of `vl3 ask` alone.

"""


def rows(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Returns name, default and description of each setting of a dataclass, nested ones with dotted names."""
    types, texts = config_tree.types(cls), config_tree.descriptions(cls)
    table = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(types[field.name]):
            table += rows(types[field.name], f"{prefix}{field.name}.")
        elif field.name not in ("amounts", "datasets", getattr(cls, "KEY", None)):
            text = " ".join(filter(None, (texts[field.name], limits(field))))
            table.append((f"{prefix}{field.name}", default(field), text))
    return table


def limits(field: dataclasses.Field) -> str:
    """Returns the values that a field may have as a sentence; "" where its type says all."""
    if choices := field.metadata.get(config_tree.CHOICES):
        return f"One of {', '.join(f'`{choice!r}`' for choice in choices)}."
    bounds = field.metadata.get(config_tree.LIMITS)
    is_plain = bounds is None or bounds.most in (None, config_tree.INT32)  # of every count
    return "" if is_plain else f"{str(bounds).capitalize()}."


def default(field: dataclasses.Field) -> str:
    """Returns the default of a field as it is written on the command line; "" where there is none."""
    value: Any = field.default
    if value is dataclasses.MISSING:
        return ""
    value = field.metadata.get(config_tree.NONE) if value is None else value
    return "" if value is None else f"`{value!r}`"


def keywords() -> list[tuple[str, str, str]]:
    """Returns name, default and description of each keyword of an answer."""
    table = []
    for cls, names in (
        (SamplingConfig, answer_settings.SAMPLING),
        (ConstraintConfig, answer_settings.CONSTRAINT),
        (ProcessorConfig, answer_settings.PROCESSOR),
        (FrameSamplingOptions, answer_settings.VIDEO),
    ):
        by_field = {name: (value, text) for name, value, text in rows(cls)}
        table += [(keyword, *by_field[field]) for keyword, field in names.items()]
    return table


def markdown(table: list[tuple[str, str, str]]) -> str:
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {value.replace('|', chr(92) + '|')} | {text} |" for name, value, text in table]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns the content of docs/settings.md."""
    datasets = [(f"data.datasets.NAME.{name}", value, text) for name, value, text in rows(DatasetSpec)]
    return f"{HEAD}{TRAINING}{markdown(rows(RunConfig))}\n{markdown(datasets)}\n{INFERENCE}{markdown(keywords())}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
