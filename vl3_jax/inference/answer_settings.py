"""The settings of an answer, which `ChatModel` takes as keywords and `vl3 ask` and `vl3 chat` as flags.

Each is a field of the dataclass that declares its type, default, choices and description.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vl3_jax import config_tree
from vl3_jax.config_tree import LIMITS
from vl3_jax.errors import InputError, SettingError
from vl3_jax.inference.constraint_config import ConstraintConfig
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.processor_config import SECONDS, ProcessorConfig

# Keyword: field of the dataclass.
SAMPLING = {field.name: field.name for field in dataclasses.fields(SamplingConfig)}
CONSTRAINT = {field.name: field.name for field in dataclasses.fields(ConstraintConfig)}
PROCESSOR = {
    "fps": "fps",
    "max_frames": "max_frames",
    "preprocess": "preprocess",
    "max_visual_tokens": "max_tokens",
    "image_merge": "image_merge",
    "prune_threshold": "prune_threshold",
    "visual_budget": "visual_budget",
}
VIDEO = {"start": "start", "end": "end"}  # fields of `FrameSamplingOptions`
PRUNE = "prune"  # False keeps every token; it stands for a `prune_threshold` of None
ALLOW_REMOTE = "allow_remote"  # whether media may be fetched from http(s):// addresses
ADAPTER = "adapter"  # name of the LoRA adapter that answers
_PER_VIDEO = ("fps", "max_frames")  # those of the processor that a video may set for itself


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """The settings of one answer.

    Attributes:
      sampling: Decoding.
      processor: Processing of the media.
      video: Options, as far as given, of videos without their own.
      allow_remote: Whether media may be fetched from http(s):// addresses.
      adapter: Name of the LoRA adapter that answers; None is the model without one.
      constraint: What the answer must match.
    """

    sampling: SamplingConfig
    processor: ProcessorConfig
    video: Mapping[str, Any]
    allow_remote: bool
    adapter: str | None
    constraint: ConstraintConfig


def resolve(keywords: Mapping[str, Any], sampling: SamplingConfig, processor: ProcessorConfig) -> AnswerSettings:
    """Applies keywords to the settings of a checkpoint; a keyword whose value is None keeps the default.

    Args:
      keywords: Values by the names above.
      sampling: Decoding settings of the checkpoint.
      processor: Processor settings of the checkpoint.

    Raises:
      InputError: An unknown keyword.
      SettingError: A value that its dataclass refuses, under the name of the keyword.
    """
    chosen = {name: value for name, value in keywords.items() if value is not None}
    known = {*SAMPLING, *CONSTRAINT, *PROCESSOR, *VIDEO, PRUNE, ALLOW_REMOTE, ADAPTER}
    for name in chosen:
        if name not in known:
            raise InputError(f"unknown setting {name!r}; known are {', '.join(sorted(known))}")

    def fields(keywords: Mapping[str, str]) -> dict[str, Any]:
        return {field: chosen[name] for name, field in keywords.items() if name in chosen}

    for name, value in chosen.items():
        if name in VIDEO:
            config_tree.check_value(name, value, float, {LIMITS: SECONDS})
        elif name in (PRUNE, ALLOW_REMOTE):
            config_tree.check_value(name, value, bool, {})
        elif name == ADAPTER:
            config_tree.check_value(name, value, str, {})
    changes = fields(PROCESSOR)
    if not chosen.get(PRUNE, True):
        if "prune_threshold" in changes:
            raise InputError("prune_threshold prunes and prune=False does not; leave one of them out")
        changes["prune_threshold"] = None
    try:
        sampling = dataclasses.replace(sampling, **fields(SAMPLING))
        processor = dataclasses.replace(processor, **changes)
    except SettingError as error:
        keyword = {field: name for name, field in (SAMPLING | PROCESSOR).items()}
        raise error.renamed(keyword.get(error.name, error.name)) from None
    constraint = ConstraintConfig(**fields(CONSTRAINT))
    if sampling.stop and not constraint.is_free:
        raise SettingError("stop", sampling.stop, "a constraint says where the answer ends; leave one of them out")
    video = fields(VIDEO) | {name: chosen[name] for name in _PER_VIDEO if name in chosen}
    allow_remote, adapter = chosen.get(ALLOW_REMOTE, False), chosen.get(ADAPTER)
    return AnswerSettings(sampling, processor, video, allow_remote, adapter, constraint)
