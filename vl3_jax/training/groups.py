"""Which parameters learn, and at what rate: one ordered list of patterns that covers every parameter.

A pattern is a regular expression that must match a parameter's whole path, its keys joined by slashes
("llm/layers/attn/q/kernel"; an adapter's leaves end in "kernel/base", "kernel/a", "kernel/b"). The first that matches
names the parameter's group.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vl3_jax.errors import InputError

Patterns = Sequence[tuple[str, str]]

# The modules of the reference trainer's learning rates.
MODULES: Patterns = ((r"vision/.*", "vision"), (r"projector/.*", "projector"), (r"llm/.*", "llm"))
# The same with adapters, wherever they are; their frozen bases stay with their modules.
WITH_LORA: Patterns = ((r".*/kernel/[ab]", "lora"), *MODULES)


def leaf_path(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as one string: dict keys and field names joined by slashes."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a tree of parameters, in the tree's own order."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_paths(function, tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function is given the path first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(leaf_path(path), *leaves), tree, *rest)


def assign(params: Any, patterns: Patterns) -> Any:
    """The group of each parameter.

    Args:
      params: tree of arrays or of their shapes.
      patterns: (regular expression, group), in order.

    Returns:
      A tree like `params` with the groups' names.

    Raises:
      InputError: a parameter that no pattern covers, a pattern that no parameter is left for, or one that is none.
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
    """Which parameters learn: those whose group has a rate that is neither None nor 0.

    Raises:
      InputError: a group without an entry in `rates`, an entry without a group, a negative rate, or nothing to learn.
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
    """The trainable and the frozen half: trees like `params` with None for the leaves of the other half."""
    trainable = jax.tree.map(lambda leaf, learns: leaf if learns else None, params, mask)
    frozen = jax.tree.map(lambda leaf, learns: None if learns else leaf, params, mask)
    return trainable, frozen


def merge(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)
