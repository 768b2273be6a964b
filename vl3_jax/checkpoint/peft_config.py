"""`adapter_config.json` of PEFT: which of its settings change the arithmetic of an adapter, and which do not.

PEFT adds settings with every release, and most of them mean another arithmetic. So this is an allow list: a setting is
understood, or has a value that switches it off, or the adapter is refused.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError

# Settings that only say how the adapter was trained or which modules it has; its tensors show the latter.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "bias",  # trained biases are stored whole
    "corda_config",  # this and similar ones belong to a value of init_lora_weights
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # PEFT ignores it where the adapted layer is a torch Linear, as in every layout
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # only counts with use_qalora
    "runtime_config",
    "target_modules",
    "task_type",
}
# Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take the adapter's
# first values out of it, so that the adapter goes with a base that no file holds.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8  # of every version of PEFT
_SHOWN = 60  # characters of a value in a message
MERGE_FIRST = "merge the adapter into its base with PEFT first (merge_and_unload)"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that its arithmetic depends on.

    Attributes:
      base: Folder or Hub id of the adapted model; empty if the file names none.
      revision: Its revision on the Hub, if any.
      rank: Rank of the adapters.
      alpha: Numerator of their scale.
      rank_pattern: Ranks of modules whose names match a regular expression.
      alpha_pattern: The same for `alpha`.
      use_rslora: Whether the scale is alpha / sqrt(rank) in place of alpha / rank.
      modules_to_save: Endings of the names of modules that were trained whole.
      ensure_weight_tying: Whether PEFT keeps tied modules tied while they are trained.
    """

    base: str
    revision: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool

    def module_rank(self, module: str) -> int:
        """Returns the rank of a module's adapter, by the name of the module in the model that was trained."""
        return _match(self.rank_pattern, module, self.rank)

    def module_scale(self, module: str) -> float:
        """Returns the factor of B @ A of a module."""
        rank = self.module_rank(module)
        return _match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def is_saved_whole(self, module: str) -> bool:
        """Returns whether `modules_to_save` names a module or one that contains it."""
        parts = module.split(".")
        containing = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(name.endswith(self.modules_to_save) for name in containing)


def parse_adapter_config(content: Any, path: object) -> AdapterConfig:
    """Checks the content of `adapter_config.json`.

    Args:
      content: The parsed file.
      path: Its path, for error messages.

    Raises:
      InputError: Not the configuration of a LoRA adapter, a setting that is not supported, or a damaged value.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no settings but {_shown(content)}; download the file again")
    settings = _Settings(content, path)
    kind = settings.take("peft_type", str, "")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {_shown(kind)} is not supported, only LORA is; {MERGE_FIRST}")
    initialisation = settings.take("init_lora_weights", object, True)
    if initialisation not in _INITIALISATIONS:
        raise settings.unsupported("init_lora_weights", initialisation)
    modules_to_save = settings.take("modules_to_save", list | str, ())
    config = AdapterConfig(
        base=settings.take("base_model_name_or_path", str, ""),
        revision=settings.take("revision", str, ""),
        rank=settings.rank("r", settings.take("r", int, _DEFAULT_RANK)),
        alpha=settings.alpha("lora_alpha", settings.take("lora_alpha", int | float, _DEFAULT_ALPHA)),
        rank_pattern=settings.pattern("rank_pattern", settings.rank),
        alpha_pattern=settings.pattern("alpha_pattern", settings.alpha),
        use_rslora=settings.take("use_rslora", bool, False),
        modules_to_save=(modules_to_save,) if isinstance(modules_to_save, str) else tuple(map(str, modules_to_save)),
        ensure_weight_tying=settings.take("ensure_weight_tying", bool, False),
    )
    settings.refuse_others()
    return config


class _Settings:
    """Takes settings out of the content of the file one by one."""

    def __init__(self, content: Mapping[str, Any], path: object):
        self._rest, self._path = dict(content), path

    def take(self, key: str, kind: Any, default: Any) -> Any:
        value = self._rest.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise self._damaged(key, value)
        return value

    def rank(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self._damaged(key, value)
        return value

    def alpha(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e30:
            raise self._damaged(key, value)
        return value

    def pattern(self, key: str, check) -> dict[str, Any]:
        patterns = self.take(key, dict, {})
        for pattern in patterns:
            try:
                re.compile(_for_module(pattern))
            except (re.error, OverflowError, RecursionError):
                raise self._damaged(key, pattern) from None
        return {pattern: check(key, value) for pattern, value in patterns.items()}

    def refuse_others(self) -> None:
        for key, value in self._rest.items():
            if key not in _WITHOUT_EFFECT and value:
                raise self.unsupported(key, value)

    def unsupported(self, key: str, value: Any) -> InputError:
        return InputError(f"{self._path}: {_shown(key)[1:-1]} {_shown(value)} is not supported; {MERGE_FIRST}")

    def _damaged(self, key: str, value: Any) -> InputError:
        return InputError(f"{self._path}: {key} {_shown(value)} makes no sense; download the file again")


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the name of a module, or its end after a dot."""
    return next((value for key, value in patterns.items() if re.match(_for_module(key), module)), default)


def _for_module(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
