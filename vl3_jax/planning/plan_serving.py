"""Answering on chips that are not there: weights, cache, and the engine's programs, compiled and weighed."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vl3_jax.errors import InputError
from vl3_jax.inference import programs
from vl3_jax.inference.sampling import SamplingConfig, SamplingParams
from vl3_jax.model import KVCache, ModelConfig, VideoLLaMA3, abstract_params, param_axes, preset
from vl3_jax.model.quantize import quantize_leaf
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings, partition_spec
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning import report
from vl3_jax.planning.compiler import GIB, MemoryAnalysis, compile_and_analyze, topology_devices
from vl3_jax.processing.packed_batch import BatchShape, pack


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of a model at once.

    Attributes:
      rows: conversations side by side.
      prompt: tokens of each, vision tokens included.
      new: tokens of each answer.
      patches: of the pictures and frames of each.
    """

    rows: int = 1
    prompt: int = 16_384
    new: int = 1024
    patches: int = 16_384


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """What the compiler says of answering.

    Attributes:
      topology: the slice.
      mesh: its axes.
      load: what is asked.
      weights, cache: bytes on a chip.
      programs: "see", "prefill" and "extend", the compiler's own figures; their arguments hold weights and cache.
    """

    topology: Topology
    mesh: dict[str, int]
    load: Workload
    weights: int
    cache: int
    programs: dict[str, MemoryAnalysis]

    @property
    def fits(self) -> bool:
        """Whether every program compiled."""
        return all(one.fits for one in self.programs.values())

    @property
    def peak(self) -> int:
        """Bytes of HBM on a chip that the largest program needs."""
        return max(one.peak for one in self.programs.values())

    @property
    def tokens_per_second(self) -> float:
        """The most that decoding can give, of all rows: each step reads weights and cache once."""
        return self.load.rows * self.topology.chip.bandwidth / (self.weights + self.cache)

    def as_json(self) -> dict[str, Any]:
        """For `vl3 plan --serve --json`."""
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            **dataclasses.asdict(self.load),
            "fits": self.fits,
            "hbm_bytes_per_chip": {
                "weights": self.weights,
                "cache": self.cache,
                "peak": self.peak,
                "limit": self.topology.chip.hbm,
            },
            "programs": {name: dataclasses.asdict(one) for name, one in self.programs.items()},
            "tokens_per_second_bound": self.tokens_per_second,
        }

    def __str__(self) -> str:
        chip, load = self.topology.chip, self.load
        verdict = "it fits" if self.fits else "it does not fit: fewer rows, patches or tokens, --quantize, more chips"
        lines = [
            f"{self.topology.name}: {self.topology.chips} chips, mesh {report.axes(self.mesh)}; {load.rows} rows of "
            f"{load.prompt:,} + {load.new:,} tokens and {load.patches:,} patches",
            f"HBM a chip    {self.peak / GIB:.2f} of {chip.hbm / GIB:.2f} GiB: {verdict}",
            f"  weights     {self.weights / GIB:6.2f} GiB",
            f"  cache       {self.cache / GIB:6.2f} GiB",
        ]
        lines += [f"  {name:10}{one.peak / GIB:8.2f} GiB at its peak" for name, one in self.programs.items()]
        rate = f"at {chip.bandwidth / 1e12:.2f} TB/s of a chip"
        lines.append(f"decoding      at most {self.tokens_per_second:,.0f} tokens/s, {rate}")
        lines.append(f"compiled in {sum(one.seconds for one in self.programs.values()):.0f} s")
        return "\n".join(lines)


def mesh_for(model: str, topology: Topology) -> dict[str, int]:
    """Heads over as many chips as there are key/value heads for, copies over the rest."""
    heads = math.gcd(topology.chips, preset(model).text.num_kv_heads)
    return {"data": topology.chips // heads, "tensor": heads}


def plan_serving(
    model: str, topology: Topology, load: Workload, mesh: Mapping[str, int] | None = None, quantize: str | None = None
) -> ServingPlan:
    """Compiles the programs that answer, in bfloat16.

    Args:
      model: a preset.
      slice_: where.
      load: what is asked at once.
      mesh: see `make_mesh`; `mesh_for` by default.
      quantize: "int8" or None.

    Raises:
      InputError: no TPU compiler here, an unknown model, a mesh that does not fit the slice, or too long a context.
    """
    model_config, slots = preset(model), load.prompt + load.new
    if slots > model_config.text.max_position_embeddings:
        raise InputError(f"{slots} tokens exceed the context of {model}, {model_config.text.max_position_embeddings}")
    grid = make_mesh(mesh or mesh_for(model, topology), topology_devices(topology))
    place = functools.partial(_placed, grid)
    params = _params(model_config, quantize, place)
    batch = _batch(load, grid)
    seen = (load.rows, batch["token_patches"].shape[1], model_config.text.hidden_size)
    features = place(jax.ShapeDtypeStruct(seen, jnp.bfloat16), ("batch", None, None))
    state = jax.tree.map(place, _state(model_config, load), programs.STATE_AXES)
    sampling_params = jax.tree.map(
        lambda leaf: place(leaf, ()), jax.eval_shape(lambda: SamplingParams.of(SamplingConfig()))
    )
    stops = place(jax.ShapeDtypeStruct((2,), jnp.int32), (None,))
    count = place(jax.ShapeDtypeStruct((), jnp.int32), ())
    vision, text = ([batch[name] for name in names] for names in (programs.VISION_ARRAYS, programs.TEXT_ARRAYS))
    net = VideoLLaMA3(model_config, jnp.bfloat16)
    asked = (params, batch["tokens"], features, *text, state.key, sampling_params, stops)
    with jax.set_mesh(grid):
        lowered = {
            "see": programs.encode_vision.lower(net, params, *vision),
            "prefill": programs.prefill.lower(net, slots, "bfloat16", 0, *asked),
            "extend": programs.decode_steps.lower(
                net, programs.STEPS_PER_CALL, 0, params, state, sampling_params, stops, count
            ),
        }
        weights = {name: compile_and_analyze(one)[0] for name, one in lowered.items()}
    return ServingPlan(
        topology, dict(grid.shape), load, _bytes_on_a_chip(params), _bytes_on_a_chip(state.cache), weights
    )


def _placed(grid: Mesh, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    where = NamedSharding(grid, partition_spec(axes, leaf.shape, grid))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _batch(load: Workload, grid: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of the packed prompts."""
    shape = BatchShape(load.prompt, load.patches, min(load.prompt, load.patches), samples=1)
    arrays = {
        name: jax.ShapeDtypeStruct((load.rows, *one.shape[1:]), one.dtype) for name, one in pack([[]], shape).items()
    }
    where = batch_shardings(arrays, grid)
    return {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=where[name]) for name, one in arrays.items()}


def _state(model_config: ModelConfig, load: Workload) -> programs.DecodeState:
    """Shapes of what decoding carries."""
    number = jax.ShapeDtypeStruct((load.rows,), jnp.int32)
    return programs.DecodeState(
        cache=jax.eval_shape(lambda: KVCache.empty(model_config.text, load.rows, load.prompt + load.new, jnp.bfloat16)),
        token=number,
        position=number,
        done=jax.ShapeDtypeStruct((load.rows,), jnp.bool_),
        generated=jax.ShapeDtypeStruct((load.rows, model_config.text.vocab_size), jnp.bool_),
        key=jax.eval_shape(lambda: jax.random.key(0)),
    )


def _params(model_config: ModelConfig, quantize: str | None, place: Callable) -> dict:
    """The parameters' shapes with their places, as `vl3_jax.load` would put them."""

    def one(path: Any, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> Any:
        name = "/".join(key.key for key in path)
        stored = jax.eval_shape(functools.partial(quantize_leaf, name), leaf) if quantize else leaf
        return jax.tree.map(lambda part: place(part, axes), stored)

    return jax.tree_util.tree_map_with_path(one, abstract_params(model_config, "bfloat16"), param_axes(model_config))


def _bytes_on_a_chip(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
