"""The loss on held-out data, every so many steps."""

from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines import devices
from data_pipelines.corpus import Corpus
from vl3_jax.model import VideoLLaMA3
from vl3_jax.training.data import loader_of, open_held_out
from vl3_jax.training.step import make_eval_step


class HeldOut:
    """Measures the loss on the annotations that `config.eval` names; without any it is never due."""

    def __init__(self, config: ConfigDict, model: VideoLLaMA3, corpus: Corpus, mesh: Mesh, rows: int):
        self._config, self._mesh, self._rows = config, mesh, rows
        self._corpus = open_held_out(config, corpus)
        self._step = make_eval_step(model)

    def due(self, step: int) -> bool:
        """Whether it is wanted after `step` steps."""
        return self._corpus is not None and step % self._config.eval.every == 0

    def measure(self, params: Any) -> dict[str, float]:
        """Mean loss of a supervised token, in nats."""
        loss = weight = 0.0
        with loader_of(self._config, self._corpus, self._mesh, self._rows) as loader:
            wanted = min(self._config.eval.steps or len(loader), len(loader))
            for number, batch in enumerate(devices.to_devices(loader, self._mesh, self._rows), start=1):
                sums = jax.device_get(self._step(params, batch.arrays))
                loss, weight = loss + float(sums.loss), weight + float(sums.weight)
                if number == wanted:
                    break
        return {"held-out loss": loss / max(weight, 1e-9)}
