"""Plans of inference: the engine's programs compiled ahead of time for a TPU topology, with weights and cache."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vl3_jax.config_tree import LIMITS, CheckedSettings, Limits
from vl3_jax.errors import InputError
from vl3_jax.inference import programs
from vl3_jax.inference.sampling import SamplingParams
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import KVCache, ModelConfig, VideoLLaMA3, abstract_params, param_axes, preset
from vl3_jax.model.quantize import quantize_leaf
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings, partition_spec
from vl3_jax.parallel.topologies import GIB, Topology
from vl3_jax.planning import report
from vl3_jax.planning.compiler import ProgramAnalysis, compile_and_analyze, topology_devices
from vl3_jax.processing.packed_batch import BatchShape, pack


@dataclasses.dataclass(frozen=True)
class Workload(CheckedSettings):
    """The conversations that a model answers at once.

    Attributes:
      rows: Number of conversations side by side.
      prompt: Tokens of each prompt, vision tokens included.
      new: Tokens of each answer.
      patches: Patches of the images and frames of each prompt.
    """

    rows: int = dataclasses.field(default=1, metadata={LIMITS: Limits(1, 65_536)})
    prompt: int = dataclasses.field(default=16_384, metadata={LIMITS: Limits(1, 2**20)})
    new: int = dataclasses.field(default=1024, metadata={LIMITS: Limits(1, 2**20)})
    patches: int = dataclasses.field(default=16_384, metadata={LIMITS: Limits(1, 2**22)})


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """The figures of inference on a topology.

    Attributes:
      topology: TPU slice or slices.
      mesh: Size of each mesh axis.
      workload: Conversations answered at once.
      weights, cache: Bytes on a chip.
      programs: The compiler's figures of "encode", "prefill" and "decode"; their arguments include weights and cache.
    """

    topology: Topology
    mesh: dict[str, int]
    workload: Workload
    weights: int
    cache: int
    programs: dict[str, ProgramAnalysis]

    @property
    def fits(self) -> bool:
        """Whether every program compiled."""
        return all(program.fits for program in self.programs.values())

    @property
    def peak(self) -> int:
        """Bytes of HBM on a chip that the largest program needs."""
        return max(program.peak for program in self.programs.values())

    @property
    def tokens_per_second(self) -> float:
        """Upper bound of decoded tokens per second, of all rows: each step reads weights and cache once."""
        return self.workload.rows * self.topology.chip.hbm_bandwidth / (self.weights + self.cache)

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `vl3 plan --serve --json` prints it."""
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            **dataclasses.asdict(self.workload),
            "fits": self.fits,
            "hbm_bytes_per_chip": {
                "weights": self.weights,
                "cache": self.cache,
                "peak": self.peak,
                "limit": self.topology.chip.hbm_bytes,
            },
            "programs": {name: program.as_json() for name, program in self.programs.items()},
            "tokens_per_second_bound": self.tokens_per_second,
        }

    def __str__(self) -> str:
        chip, workload = self.topology.chip, self.workload
        verdict = "it fits" if self.fits else "it does not fit: fewer rows, patches or tokens, --quantize, more chips"
        lines = [
            f"{self.topology.name}: {self.topology.chips} chips, mesh {report.axes(self.mesh)}; {workload.rows} rows "
            f"of {workload.prompt:,} + {workload.new:,} tokens and {workload.patches:,} patches",
            f"HBM a chip    {self.peak / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB: {verdict}",
            f"  weights     {self.weights / GIB:6.2f} GiB",
            f"  cache       {self.cache / GIB:6.2f} GiB",
        ]
        lines += [f"  {name:10}{program.peak / GIB:8.2f} GiB at its peak" for name, program in self.programs.items()]
        rate = f"at {chip.hbm_bandwidth / 1e12:.2f} TB/s of a chip"
        lines.append(f"decoding      at most {self.tokens_per_second:,.0f} tokens/s, {rate}")
        lines.append(f"compiled in {sum(program.seconds for program in self.programs.values()):.0f} s")
        return "\n".join(lines)


def mesh_for(model: str, topology: Topology) -> dict[str, int]:
    """Returns the default mesh: heads over as many chips as there are key/value heads for, copies over the rest."""
    heads = math.gcd(topology.chips, preset(model).text.num_kv_heads)
    return {"data": topology.chips // heads, "tensor": heads}


def plan_serving(
    model: str,
    topology: Topology,
    workload: Workload,
    mesh: Mapping[str, int] | None = None,
    quantize: str | None = None,
    hlo: pathlib.Path | None = None,
) -> ServingPlan:
    """Compiles the engine's programs in bfloat16 for a topology.

    Args:
      model: Model preset.
      topology: TPU slice or slices.
      workload: Conversations answered at once.
      mesh: Size of each mesh axis, see `make_mesh`; by default that of `mesh_for`.
      quantize: "int8" or None.
      hlo: Folder that the optimised HLO text of each program is written to, as encode.hlo, prefill.hlo and decode.hlo.

    Raises:
      InputError: No TPU compiler is installed, the model is unknown, the mesh does not fit the topology, or the context
        is too long.
    """
    model_config, slots = preset(model), workload.prompt + workload.new
    if slots > model_config.text.max_position_embeddings:
        raise InputError(f"{slots} tokens exceed the context of {model}, {model_config.text.max_position_embeddings}")
    device_mesh = make_mesh(mesh or mesh_for(model, topology), topology_devices(topology))
    shard = functools.partial(_with_sharding, device_mesh)
    params = _params(model_config, quantize, shard)
    batch = _batch(workload, device_mesh)
    feature_shape = (workload.rows, batch["token_patches"].shape[1], model_config.text.hidden_size)
    features = shard(jax.ShapeDtypeStruct(feature_shape, jnp.bfloat16), ("batch", None, None))
    state = jax.tree.map(shard, _state(model_config, workload), programs.STATE_AXES)
    sampling = jax.tree.map(lambda leaf: shard(leaf, ()), jax.eval_shape(lambda: SamplingParams.of(SamplingConfig())))
    stops = shard(jax.ShapeDtypeStruct((2,), jnp.int32), (None,))
    count = shard(jax.ShapeDtypeStruct((), jnp.int32), ())
    vision, text = ([batch[name] for name in names] for names in (programs.VISION_ARRAYS, programs.TEXT_ARRAYS))
    module = VideoLLaMA3(model_config, jnp.bfloat16)
    prompts = (params, (batch["tokens"], features, *text), state.key, sampling, stops)
    decode = (programs.STEPS_PER_CALL, 0, params, state, sampling, stops, count)
    with jax.set_mesh(device_mesh):
        lowered = {
            "encode": programs.encode_vision.lower(module, params, *vision),
            "prefill": programs.prefill.lower(module, slots, 0, *prompts),
            "decode": programs.decode_steps.lower(module, *decode),
        }
        analyses = {
            name: compile_and_analyze(program, hlo=hlo and hlo / f"{name}.hlo") for name, program in lowered.items()
        }
    weights, cache = _bytes_per_chip(params), _bytes_per_chip(state.cache)
    return ServingPlan(topology, dict(device_mesh.shape), workload, weights, cache, analyses)


def _with_sharding(mesh: Mesh, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _batch(workload: Workload, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the packed prompts."""
    vision_tokens = min(workload.prompt, workload.patches)
    shape = BatchShape(workload.prompt, workload.patches, vision_tokens, samples=1)
    arrays = {
        name: jax.ShapeDtypeStruct((workload.rows, *array.shape[1:]), array.dtype)
        for name, array in pack([[]], shape).items()
    }
    shardings = batch_shardings(arrays, mesh)
    return {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name]) for name, array in arrays.items()
    }


def _state(model_config: ModelConfig, workload: Workload) -> programs.DecodeState:
    """Returns the shapes of the decoding state."""
    text, rows = model_config.text, workload.rows
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return programs.DecodeState(
        cache=jax.eval_shape(lambda: KVCache.empty(text, rows, workload.prompt + workload.new, jnp.bfloat16)),
        token=number,
        position=number,
        done=jax.ShapeDtypeStruct((rows,), jnp.bool_),
        generated=jax.ShapeDtypeStruct((rows, text.vocab_size), jnp.bool_),
        key=jax.eval_shape(lambda: jax.random.key(0)),
    )


def _params(model_config: ModelConfig, quantize: str | None, shard: Callable) -> dict:
    """Returns the shapes of the parameters with the shardings that `vl3_jax.load` gives them."""

    def stored(path: Any, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> Any:
        name = "/".join(key.key for key in path)
        kernel = jax.eval_shape(functools.partial(quantize_leaf, name), leaf) if quantize else leaf
        return jax.tree.map(lambda part: shard(part, axes), kernel)

    return jax.tree_util.tree_map_with_path(stored, abstract_params(model_config, "bfloat16"), param_axes(model_config))


def _bytes_per_chip(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
