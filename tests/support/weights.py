"""Random parameters whose every part matters, without the reference: quick to make and well conditioned."""

import math

import jax
import numpy as np

from vl3_jax.model import ModelConfig, abstract_params


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """A parameter tree of NumPy float32: kernels over the square root of their fan-in, norms and biases off neutral."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        module, kind = (key.key for key in path[-2:])
        if kind == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        if kind == "embedding":
            return rng.standard_normal(leaf.shape, np.float32)
        if kind == "bias":
            return 0.3 * rng.standard_normal(leaf.shape, np.float32)
        inputs = {"q": leaf.shape[-3:-2], "k": leaf.shape[-3:-2], "v": leaf.shape[-3:-2], "out": leaf.shape[-3:-1]}
        fan_in = math.prod(inputs.get(module, leaf.shape[-2:-1]))
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
