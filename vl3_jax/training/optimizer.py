"""AdamW with a peak rate for each group of parameters and one schedule for all, or Muon for small models.

Defaults are those of the reference trainer: betas 0.9 and 0.999, epsilon 1e-8, no weight decay, linear warmup over 3 %
of the steps, then half a cosine to zero. It names a gradient clip of 1.0 which its shipped settings probably do not
apply; here it is applied unless `clip_norm` is None.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vl3_jax.errors import InputError
from vl3_jax.training.groups import MODULES, Patterns, assign, flatten, map_paths, split, trainable_mask

KINDS = ("adamw", "muon")
# Leaves that never decay: biases, and the scales of LayerNorm and RMSNorm.
NO_DECAY = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn.

    Attributes:
      rates: the peak learning rate of each group of `patterns`; None or 0 freezes it.
      steps: length of the run, in optimizer steps.
      patterns: which parameter is in which group, see `vl3_jax.training.groups`.
      warmup_ratio: share of the steps, rounded up, over which the rates rise from 0.
      kind: "adamw", or "muon": orthogonalised momentum (arXiv 2502.16982) for the matrices of layers and projector and
        AdamW for the rest. Muon gathers whole matrices and is meant for small models.
      b1, b2, eps, weight_decay: of AdamW; the decay, times the rate, is of both kinds and of kernels and embeddings.
      muon_beta: momentum of Muon.
      clip_norm: the largest global norm of a gradient; None does not clip.
      mu_dtype: type of the first moment; "bfloat16" saves two bytes for each trained parameter.
    """

    learning_rates: Mapping[str, float | None]
    steps: int
    patterns: Patterns = MODULES
    warmup_ratio: float = 0.03
    kind: str = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_beta: float = 0.95
    clip_norm: float | None = 1.0
    mu_dtype: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"optimizer {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; give at least 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio is {self.warmup_ratio}; give a share of the steps, 0 to 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"clip_norm is {self.clip_norm}; give a positive number, or None not to clip")

    @property
    def warmup_steps(self) -> int:
        return math.ceil(self.warmup_ratio * self.steps)


def schedule(steps: int, warmup_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The multiplier of the peak rates at a step (from 0): transformers' `get_cosine_schedule_with_warmup`.

    0 at step 0 if there is any warmup, 1 at `warmup_steps`, 0 again at `steps`.
    """

    def multiplier(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(warmup_steps, 1)
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        falling = jnp.maximum(0.5 * (1.0 + jnp.cos(jnp.pi * progress)), 0.0)
        return jnp.where(step < warmup_steps, rising, falling)

    return multiplier


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The settings, resolved for one tree of parameters.

    Attributes:
      settings: what it was made from.
      groups: tree like the parameters, the group of each.
      mask: tree like the parameters, whether it learns.
      transform: the optax transformation, over the trainable half of the tree.
    """

    settings: OptimizerConfig
    groups: Any
    mask: Any
    transform: optax.GradientTransformation

    def init(self, params: Any) -> optax.OptState:
        """The state at step 0: float32 moments of what learns, nothing of what does not."""
        return self.transform.init(_wide(split(params, self.mask)[0]))

    def update(self, gradients: Any, opt_state: optax.OptState, trainable: Any) -> tuple[Any, optax.OptState]:
        """One step.

        Args:
          gradients, trainable: trees of the trainable half, see `groups.split`.
          opt_state: of the step before.

        Returns:
          The trainable half after the step, in its own types, and the new state.
        """
        updates, opt_state = self.transform.update(_wide(gradients), opt_state, _wide(trainable))
        new = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), trainable, updates)
        return new, opt_state

    def learning_rates(self, step: jax.Array) -> dict[str, jax.Array]:
        """The learning rate of each group at a step (from 0)."""
        multiplier = schedule(self.settings.steps, self.settings.warmup_steps)(step)
        return {group: (rate or 0.0) * multiplier for group, rate in self.settings.learning_rates.items()}


def make_optimizer(settings: OptimizerConfig, params: Any) -> Optimizer:
    """Resolves the settings for `params`, a tree of arrays or of their shapes.

    Raises:
      InputError: what `groups.assign` and `groups.trainable_mask` raise, or an int8 parameter that is to learn.
    """
    groups = assign(params, settings.patterns)
    mask = trainable_mask(groups, settings.learning_rates)
    for path, leaf in flatten(split(params, mask)[0]).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"parameter {path} is {leaf.dtype} and cannot learn; freeze its group")
    trained_groups, _ = split(groups, mask)
    parts = []
    if settings.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(settings.clip_norm))
    parts.append(_muon(settings, trained_groups) if settings.kind == "muon" else _adam(settings))
    if settings.weight_decay:
        decays = map_paths(lambda path, _: path.rsplit("/", 1)[-1] not in NO_DECAY, trained_groups)
        parts.append(optax.add_decayed_weights(settings.weight_decay, decays))
    parts.append(_scale_by_group_rates(settings, trained_groups))
    return Optimizer(settings, groups, mask, optax.chain(*parts))


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _adam(settings: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=settings.mu_dtype)


def _muon(settings: OptimizerConfig, trained: Any) -> optax.GradientTransformation:
    def dimensions(tree: Any) -> Any:
        return map_paths(lambda path, _: matrix_dimensions(path), tree)

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=settings.muon_beta, mu_dtype=settings.mu_dtype, weight_dimension_numbers=dimensions
        ),
        _scale_like_adam(dimensions),
    )
    labels = map_paths(lambda path, _: "adam" if matrix_dimensions(path) is None else "muon", trained)
    return optax.partition({"muon": muon, "adam": _adam(settings)}, labels)


def _scale_like_adam(dimensions: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Gives an orthogonal matrix the root mean square of AdamW's updates, 0.2, so that one rate serves both."""

    def scale(update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        sides = (math.prod(update.shape[axis] for axis in side) for side in matrix)
        return 0.2 * math.sqrt(max(sides)) * update

    def update(updates: Any, _params: Any = None) -> Any:
        return jax.tree.map(scale, updates, dimensions(updates))

    return optax.stateless(update)


def matrix_dimensions(path: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions of a kernel are its rows and columns (stacked layers are apart); None for what is no matrix.

    Attention kernels are [layers, D, heads, head_dim] and back. Text embeddings, the output head and adapters are left
    to AdamW, like biases and norms. The patch embedding is a matrix like others: its inputs are nearly the same in all
    patches but for a few directions, which carry the picture and which AdamW finds late.
    """
    *modules, module, kind = path.split("/")
    if kind != "kernel" or not ("layers" in modules or modules == ["projector"] or module == "patch_embed"):
        return None
    first = int("layers" in modules)
    if module == "out":
        return optax.contrib.MuonDimensionNumbers((first, first + 1), (first + 2,))
    if module in ("q", "k", "v"):
        return optax.contrib.MuonDimensionNumbers((first,), (first + 1, first + 2))
    return optax.contrib.MuonDimensionNumbers((first,), (first + 1,))


def _scale_by_group_rates(settings: OptimizerConfig, groups: Any) -> optax.GradientTransformation:
    """Times minus the rate of each leaf's group at this step."""
    multiplier = schedule(settings.steps, settings.warmup_steps)

    def init(_params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates: Any, state: optax.ScaleByScheduleState, _params: Any = None):
        now = multiplier(state.count)
        updates = jax.tree.map(lambda u, group: -settings.learning_rates[group] * now * u, updates, groups)
        return updates, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
