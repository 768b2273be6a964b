"""`adapter_config.json` of PEFT: which of its settings change the arithmetic of an adapter, and which do not.

PEFT adds settings with every release, and most of them mean another arithmetic. So this is an allow list: a setting is
understood, or has a value that switches it off, or the adapter is refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from vl3_jax import config_tree
from vl3_jax.json_file import JsonObject

_UNDERSTOOD = {
    "alpha_pattern",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "init_lora_weights",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "use_rslora",
}
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
MERGE_FIRST = "merge the adapter into its base with PEFT first (merge_and_unload)"
MERGE_BEFORE_LOADING = "such an adapter cannot stay apart from its base: merge both with `vl3 convert hf`"


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


def parse_adapter_config(settings: JsonObject) -> AdapterConfig:
    """Checks the content of `adapter_config.json`.

    Raises:
      InputError: Not the configuration of a LoRA adapter, a setting that is not supported, or a damaged value.
    """
    if settings.text("peft_type") != "LORA":
        raise settings.error("peft_type", f"only LORA is supported; {MERGE_FIRST}")
    unsupported = [key for key in settings if key not in _UNDERSTOOD | _WITHOUT_EFFECT and settings[key]]
    if settings.get("init_lora_weights") not in _INITIALISATIONS:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise settings.error(unsupported[0], f"that is not supported; {MERGE_FIRST}")
    rank, alpha = settings.integer("r", _DEFAULT_RANK, low=1), _alpha(settings, "lora_alpha", _DEFAULT_ALPHA)
    ranks, alphas = settings.section("rank_pattern"), settings.section("alpha_pattern")
    for pattern, patterns in [*((key, ranks) for key in ranks), *((key, alphas) for key in alphas)]:
        if config_tree.regex_problem(_for_module(pattern)):
            raise patterns.error(pattern, "its key is no regular expression")
        try:
            _matches(pattern, "")
        except ValueError as error:
            raise patterns.error(pattern, f"its key needs more than a linear search: {error}; {MERGE_FIRST}") from None
    return AdapterConfig(
        base=settings.text("base_model_name_or_path", ""),
        revision=settings.text("revision", ""),
        rank=rank,
        alpha=alpha,
        rank_pattern={pattern: ranks.integer(pattern, rank, low=1) for pattern in ranks},
        alpha_pattern={pattern: _alpha(alphas, pattern, alpha) for pattern in alphas},
        use_rslora=settings.flag("use_rslora"),
        modules_to_save=settings.texts("modules_to_save"),
        ensure_weight_tying=settings.flag("ensure_weight_tying"),
    )


def _alpha(section: JsonObject, key: str, default: float) -> float:
    return section.number(key, default, low=-1e30)


def _match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the name of a module."""
    return next((value for key, value in patterns.items() if _matches(key, module)), default)


def _matches(pattern: str, module: str) -> bool:
    """Returns whether a pattern of PEFT matches the name of a module, or its end after a dot.

    Patterns come with downloaded files, and Python's `re` may try for ever; RE2 takes time in proportion to the name.

    Raises:
      ValueError: A pattern that RE2 has no counterpart of, such as one that looks ahead.
    """
    import pyarrow
    from pyarrow import compute

    return compute.match_substring_regex(pyarrow.array([module]), f"^{_for_module(pattern)}")[0].as_py()


def _for_module(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
