"""The loss on held-out data, measured between training steps."""

from typing import Any

import jax
from jax.sharding import Mesh

from data_pipelines.mixture_dataset import MixtureDataset
from vl3_jax.model import VideoLLaMA3
from vl3_jax.training import device_feed
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.step import make_eval_step
from vl3_jax.training.train_data import build_loader, open_held_out


class Evaluator:
    """Measures the loss on the annotations that `config.eval` names; without any it is never due."""

    def __init__(self, config: RunConfig, model: VideoLLaMA3, mixture: MixtureDataset, mesh: Mesh, rows: int):
        self._config, self._mesh, self._rows = config, mesh, rows
        self._held_out = open_held_out(config.eval, mixture)
        self._step = make_eval_step(model)

    def is_due(self, step: int) -> bool:
        """Returns whether to evaluate after `step` steps."""
        return self._held_out is not None and step % self._config.eval.every == 0

    def measure(self, params: Any) -> dict[str, float]:
        """Returns the mean loss of a supervised token, in nats."""
        loss = weight = 0.0
        with build_loader(self._config, self._held_out, self._mesh, self._rows) as loader:
            steps = min(self._config.eval.steps or len(loader), len(loader))
            for number, batch in enumerate(device_feed.prefetch_to_device(loader, self._mesh, self._rows), start=1):
                sums = jax.device_get(self._step(params, batch.arrays))
                loss, weight = loss + float(sums.loss), weight + float(sums.weight)
                if number == steps:
                    break
        return {"held-out loss": loss / max(weight, 1e-9)}
