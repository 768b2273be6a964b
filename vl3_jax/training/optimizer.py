"""AdamW with a peak learning rate for each group of parameters and one schedule for all, or Muon for small models.

Defaults are those of the reference trainer. It names a gradient clip of 1.0 which its shipped settings probably do not
apply; here it is applied unless `clip` is 0.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from vl3_jax.config_tree import CHOICES, LIMITS, REGEX, SHARE, CheckedSettings, Limits
from vl3_jax.errors import InputError
from vl3_jax.training.groups import MODULES, Patterns, assign, flatten, kernel_sides, map_paths, split, trainable_mask

KINDS = ("adamw", "muon")
_BETA = Limits(0, 1 - 1e-7)  # 1 would never forget
# What learning rates are multiplied by in a step that has `ratio` times the samples they are meant for.
SCALINGS: Mapping[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "sqrt": math.sqrt,  # keeps the variance of AdamW's updates (arXiv 2205.10287)
    "linear": lambda ratio: ratio,
}
# Leaves without weight decay: biases, and the scales of LayerNorm and RMSNorm.
NO_DECAY = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(CheckedSettings):
    """The optimizer of a run.

    Attributes:
      learning_rates: Peak learning rate of each group of parameters; None or 0 freezes the group.
      groups: Pairs of a pattern of parameter paths and the group it puts them in, in order; see
        `vl3_jax.training.groups`.
      kind: "adamw", or "muon": orthogonalised momentum (arXiv 2502.16982) for the matrices of layers and projector and
        AdamW for the rest. Muon gathers whole matrices and is meant for small models.
      warmup_ratio: Share of the steps, rounded up, over which the learning rates rise from 0; half a cosine back to 0
        follows. The last step is never part of it, so that each run has a step with the peak learning rates.
      b1, b2, eps: Betas and epsilon of AdamW.
      weight_decay: Decay of kernels and embeddings, times the learning rate.
      muon_beta: Momentum of Muon.
      clip: Largest global norm of the gradient; 0 does not clip.
      scale_with_batch: How learning rates follow the samples of a step, relative to `batch.samples`, where rows and
        mesh make them more or fewer: "none", by the square root ("sqrt"), or in proportion ("linear").
      first_moment_dtype: Type of the first moment; "bfloat16" saves two bytes for each trainable parameter.
    """

    learning_rates: Mapping[str, float | None] = dataclasses.field(metadata={LIMITS: Limits(0, 1000)})
    groups: Patterns = dataclasses.field(default=MODULES, metadata={REGEX: True})
    kind: str = dataclasses.field(default="adamw", metadata={CHOICES: KINDS})
    warmup_ratio: float = dataclasses.field(default=0.03, metadata={LIMITS: SHARE})
    b1: float = dataclasses.field(default=0.9, metadata={LIMITS: _BETA})
    b2: float = dataclasses.field(default=0.999, metadata={LIMITS: _BETA})
    eps: float = dataclasses.field(default=1e-8, metadata={LIMITS: Limits(above=0, most=1)})
    weight_decay: float = dataclasses.field(default=0.0, metadata={LIMITS: Limits(0, 1000)})
    muon_beta: float = dataclasses.field(default=0.95, metadata={LIMITS: _BETA})
    clip: float = dataclasses.field(default=1.0, metadata={LIMITS: Limits(0, 1e30)})
    scale_with_batch: str = dataclasses.field(default="none", metadata={CHOICES: tuple(SCALINGS)})
    first_moment_dtype: str = dataclasses.field(default="float32", metadata={CHOICES: ("float32", "bfloat16")})

    def for_batch(self, ratio: float) -> "OptimizerConfig":
        """Returns the settings of a run whose steps have `ratio` times the samples that the learning rates are for."""
        factor = SCALINGS[self.scale_with_batch](ratio)
        rates = {group: rate and factor * rate for group, rate in self.learning_rates.items()}
        return dataclasses.replace(self, learning_rates=rates)

    def warmup_steps(self, steps: int) -> int:
        """Returns the number of warmup steps in a run of `steps`."""
        return min(math.ceil(self.warmup_ratio * steps), steps - 1)


def schedule(steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns the multiplier of the peak rates at a step (from 0): transformers' `get_cosine_schedule_with_warmup`.

    It is 0 at step 0 if there is any warmup, 1 at `warmup_steps`, 0 again at `steps` and after.
    """
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps, max(steps, warmup_steps + 1))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer for one tree of parameters.

    Attributes:
      config: Settings it was made from.
      schedule: Multiplier of the peak learning rates at a step.
      groups: Tree like the parameters with the group of each.
      mask: Tree like the parameters with whether each is trainable.
      transform: Optax transformation of the trainable half of the tree.
    """

    config: OptimizerConfig
    schedule: optax.Schedule
    groups: Any
    mask: Any
    transform: optax.GradientTransformation

    def init(self, params: Any) -> optax.OptState:
        """Returns the state at step 0: float32 moments of the trainable parameters, nothing of the frozen ones."""
        return self.transform.init(optax.tree.cast(split(params, self.mask)[0], jnp.float32))

    def update(self, gradients: Any, opt_state: optax.OptState, trainable: Any) -> tuple[Any, optax.OptState]:
        """Applies one step.

        Args:
          gradients: Tree of the trainable half, see `groups.split`.
          opt_state: State after the previous step.
          trainable: Trainable half of the parameters.

        Returns:
          The trainable half after the step, in its own types, and the new state.
        """
        gradients, params = (optax.tree.cast(tree, jnp.float32) for tree in (gradients, trainable))
        updates, opt_state = self.transform.update(gradients, opt_state, params)
        return optax.apply_updates(trainable, updates), opt_state

    def learning_rates(self, step: jax.Array) -> dict[str, ArrayLike]:
        """Returns the learning rate of each group at a step (from 0)."""
        multiplier = self.schedule(step)
        return {group: (rate or 0.0) * multiplier for group, rate in self.config.learning_rates.items()}


def make_optimizer(config: OptimizerConfig, params: Any, steps: int) -> Optimizer:
    """Builds the optimizer of a tree of parameters.

    Args:
      config: Its settings.
      params: Tree of arrays or of their shapes.
      steps: Number of optimizer steps in the whole run.

    Raises:
      InputError: What `groups.assign` and `groups.trainable_mask` raise, no steps, or a trainable int8 parameter.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}; give at least 1")
    groups = assign(params, config.groups)
    mask = trainable_mask(groups, config.learning_rates)
    trainable, trainable_groups = split(params, mask)[0], split(groups, mask)[0]
    for path, leaf in flatten(trainable).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"parameter {path} is {leaf.dtype} and cannot be trained; freeze its group")
    multiplier = schedule(steps, config.warmup_steps(steps))
    transforms = []
    if config.clip:
        transforms.append(optax.clip_by_global_norm(config.clip))
    transforms.append(_muon(config, trainable) if config.kind == "muon" else _adam(config))
    if config.weight_decay:
        decays = map_paths(lambda path, _: path.rsplit("/", 1)[-1] not in NO_DECAY, trainable)
        transforms.append(optax.add_decayed_weights(config.weight_decay, decays))
    by_group: dict[Hashable, optax.GradientTransformation] = {
        group: optax.scale_by_learning_rate(lambda step, rate=rate: rate * multiplier(step))
        for group, rate in config.learning_rates.items()
        if rate
    }
    transforms.append(optax.partition(by_group, trainable_groups))
    return Optimizer(config, multiplier, groups, mask, optax.chain(*transforms))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.first_moment_dtype)


def _muon(config: OptimizerConfig, trainable: Any) -> optax.GradientTransformation:
    """Gives orthogonal matrices the root mean square of AdamW's updates, 0.2, so that one rate serves both."""

    def dimensions(tree: Any) -> Any:
        return map_paths(lambda path, leaf: matrix_dimensions(path, leaf.ndim), tree)

    def rescale(update: jax.Array, matrix: Sequence[Sequence[int]]) -> jax.Array:
        return 0.2 * math.sqrt(max(math.prod(update.shape[axis] for axis in side) for side in matrix)) * update

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.muon_beta, mu_dtype=config.first_moment_dtype, weight_dimension_numbers=dimensions
        ),
        optax.stateless(lambda updates, _params: jax.tree.map(rescale, updates, dimensions(updates))),
    )
    labels = map_paths(lambda path, leaf: "muon" if matrix_dimensions(path, leaf.ndim) else "adam", trainable)
    return optax.partition({"muon": muon, "adam": _adam(config)}, labels)


def matrix_dimensions(path: str, ndim: int) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which of the `ndim` dimensions of a kernel are its rows and columns; None for a parameter of no matrix.

    Stacked layers are matrices of their own. Text embeddings, the output head and adapters are left to AdamW, like
    biases and norms. The patch embedding is a matrix like others: its inputs are nearly the same in all patches but for
    a few directions, which carry the image and which AdamW finds late.
    """
    *modules, module, kind = path.split("/")
    if kind != "kernel" or not ("layers" in modules or modules == ["projector"] or module == "patch_embed"):
        return None
    _, inputs, outputs = kernel_sides(path, tuple(range(ndim)))
    return optax.contrib.MuonDimensionNumbers(inputs, outputs)
