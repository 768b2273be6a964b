"""Random, well-conditioned parameters in which every part of the model affects the result."""

import math

import jax
import numpy as np

from vl3_jax.model import ModelConfig, abstract_params


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Creates a parameter tree of float32 NumPy arrays.

    Kernels are scaled by the square root of their fan-in; norms and biases are away from their neutral values.
    """
    rng = np.random.default_rng(seed)

    def random_leaf(path, leaf):
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

    return jax.tree_util.tree_map_with_path(random_leaf, abstract_params(config))
