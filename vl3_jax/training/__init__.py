"""Training: loss, parameter groups, optimizer, state, train step, LoRA adapters, and model FLOPs.

The functions exported here work on nested dicts of parameters and on packed batches; they read no data and know no
tokenizer.
"""

from vl3_jax.training.cross_entropy import token_losses
from vl3_jax.training.flops import StepFlops, StepWork, count_work, peak_flops, step_flops
from vl3_jax.training.groups import MODULES, WITH_LORA, assign, flatten, merge, split, trainable_mask
from vl3_jax.training.lora import add_adapters, merge_adapters, remove_adapters
from vl3_jax.training.loss import LossSums, loss_sums, unembedding
from vl3_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer, schedule
from vl3_jax.training.state import TrainState, abstract_state, new_state, state_shardings
from vl3_jax.training.step import batch_loss, make_eval_step, make_train_step

__all__ = [
    "MODULES",
    "WITH_LORA",
    "LossSums",
    "Optimizer",
    "OptimizerConfig",
    "StepFlops",
    "StepWork",
    "TrainState",
    "abstract_state",
    "add_adapters",
    "assign",
    "batch_loss",
    "count_work",
    "flatten",
    "loss_sums",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "merge",
    "merge_adapters",
    "new_state",
    "peak_flops",
    "remove_adapters",
    "schedule",
    "split",
    "state_shardings",
    "step_flops",
    "token_losses",
    "trainable_mask",
    "unembedding",
]
