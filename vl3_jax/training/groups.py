"""Groups of parameters, each with a learning rate: one ordered list of patterns that covers every parameter.

A pattern is a regular expression that must match the whole path of a parameter, its keys joined by slashes:
"llm/layers/attn/q/kernel". The leaves of an adapted kernel end in "kernel/base", "kernel/a" and "kernel/b". The first
pattern that matches names the group of the parameter.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from vl3_jax.errors import InputError

Patterns = Sequence[tuple[str, str]]

# The modules that have a learning rate in the reference trainer.
MODULES: Patterns = ((r"vision/.*", "vision"), (r"projector/.*", "projector"), (r"llm/.*", "llm"))
# The same with a group of all adapters; the kernels under them stay in the groups of their modules.
WITH_LORA: Patterns = ((r".*/kernel/[ab]", "lora"), *MODULES)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path (dict keys and field names joined by slashes), in the order of the tree."""
    return {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_paths(function: Callable, tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Maps a tree like `jax.tree.map`; the first argument of `function` is the path of the leaf."""
    return jax.tree.map_with_path(lambda path, *leaves: function(_joined(path), *leaves), tree, *rest, is_leaf=is_leaf)


def kernel_sides(path: str, dimensions: tuple) -> tuple[tuple, tuple, tuple]:
    """Splits the dimensions of a kernel (sizes, names or numbers) into stacked layers, inputs and outputs.

    Attention kernels are [layers, D, heads, head_dim], and back in the output projection, which contracts both.
    """
    *modules, module, _ = path.split("/")
    stacked = int("layers" in modules)
    end_of_inputs = stacked + (2 if module == "out" else 1)
    return dimensions[:stacked], dimensions[stacked:end_of_inputs], dimensions[end_of_inputs:]


def assign(params: Any, patterns: Patterns) -> Any:
    """Assigns a group to each parameter.

    Args:
      params: Tree of arrays or of their shapes.
      patterns: Pairs of a regular expression and a group, in order.

    Returns:
      A tree like `params` with the names of the groups.

    Raises:
      InputError: No pattern covers a parameter, no parameter is left for a pattern, or a pattern is not a regular
        expression.
    """
    compiled = []
    for pattern, group in patterns:
        try:
            compiled.append((re.compile(pattern), group))
        except re.error as error:
            raise InputError(f"group {group!r}: {pattern!r} is not a regular expression: {error}") from None
    unused = set(range(len(compiled)))

    def group_of(path: str, _leaf: Any) -> str:
        for index, (pattern, group) in enumerate(compiled):
            if pattern.fullmatch(path):
                unused.discard(index)
                return group
        raise InputError(f"parameter {path} is in no group; add a pattern for it to the groups")

    groups = map_paths(group_of, params)
    if unused:
        pattern, group = patterns[min(unused)]
        raise InputError(f"group {group!r}: no parameter is left for {pattern!r}; the groups are tried in order")
    return groups


def trainable_mask(groups: Any, learning_rates: Mapping[str, float | None]) -> Any:
    """Marks the trainable parameters: those whose group has a learning rate that is neither None nor 0.

    Args:
      groups: Tree with the group of each parameter, from `assign`.
      learning_rates: Peak learning rate of each group.

    Returns:
      A tree of bools like `groups`.

    Raises:
      InputError: A group has no learning rate, a learning rate has no group or is negative, or every group is frozen.
    """
    present = sorted(set(jax.tree.leaves(groups)))
    missing, unknown = sorted(set(present) - set(learning_rates)), sorted(set(learning_rates) - set(present))
    if missing:
        raise InputError(f"group {missing[0]!r} has no learning rate; give it one, or None to freeze it")
    if unknown:
        raise InputError(f"a learning rate for {unknown[0]!r}, which is no group; the groups are {', '.join(present)}")
    for group, rate in learning_rates.items():
        if rate is not None and rate < 0:
            raise InputError(f"group {group!r} has the learning rate {rate}; it cannot be negative")
    if not any(learning_rates.values()):
        raise InputError("every group is frozen: there is nothing to train")
    return jax.tree.map(lambda group: bool(learning_rates[group]), groups)


def split(params: Any, mask: Any) -> tuple[Any, Any]:
    """Splits parameters into a trainable and a frozen tree like `params`, with None for the leaves of the other."""
    trainable = jax.tree.map(lambda leaf, is_trainable: leaf if is_trainable else None, params, mask)
    frozen = jax.tree.map(lambda leaf, is_trainable: None if is_trainable else leaf, params, mask)
    return trainable, frozen


def merge(trainable: Any, frozen: Any) -> Any:
    """Merges the two trees of `split` into the whole tree."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def _joined(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
