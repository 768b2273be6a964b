"""Plans of inference: the engine's programs compiled ahead of time for a TPU topology, with weights and cache."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from vl3_jax.checkpoint.loading import most_on_host
from vl3_jax.config_tree import LIMITS, CheckedSettings, Limits
from vl3_jax.errors import InputError
from vl3_jax.inference.buckets import part_sizes
from vl3_jax.inference.compiled_programs import CompiledPrograms
from vl3_jax.inference.programs import described_state
from vl3_jax.model import ModelConfig, VideoLLaMA3, preset
from vl3_jax.model.serving_layout import abstract_serving_params, serving_axes
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import partition_spec
from vl3_jax.parallel.topologies import GIB, Topology
from vl3_jax.planning import report
from vl3_jax.planning.compiler import ProgramAnalysis, compile_and_analyze, topology_devices

_PROGRAMS = {"encode_vision": "encode", "prefill": "prefill", "decode_steps": "decode"}  # names in a plan


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
      host: Most bytes of the weights that a host holds at a time while it loads them.
      programs: The compiler's figures of "encode", "prefill" and "decode"; their arguments include weights and cache.
        The cycles of "decode" are those of one token of each row, chosen greedily.
    """

    topology: Topology
    mesh: dict[str, int]
    workload: Workload
    weights: int
    cache: int
    host: int
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
            # No program runs: each array is copied from the host to where it stays.
            "loading": {"peak": self.weights, "transient": 0, "host": self.host},
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
            f"  loading     {self.weights / GIB:6.2f} GiB at its peak, nothing besides the weights; "
            f"{self.host / GIB:.2f} GiB on a host",
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
    module = VideoLLaMA3(model_config, jnp.bfloat16, serving=True)

    def analyze(name: str, lowered: jax.stages.Lowered) -> ProgramAnalysis:
        return compile_and_analyze(lowered, hlo=hlo and hlo / f"{_PROGRAMS[name]}.hlo")

    compiled = CompiledPrograms(module, params, 2, device_mesh, compile_lowered=analyze)
    part = part_sizes(0, lambda start: workload.prompt)[-1]
    analyses = {
        "encode": compiled.encode(workload.patches, 1),
        "prefill": compiled.prefill(workload.rows, slots, part),
        "decode": compiled.decode(workload.rows, slots, 0, True),
    }
    state = described_state(module, workload.rows, slots, device_mesh)
    weights, cache = bytes_per_chip(params), bytes_per_chip(state.cache)
    host = most_on_host(map(_num_bytes, flatten_dict(params).values()))
    return ServingPlan(topology, dict(device_mesh.shape), workload, weights, cache, host, analyses)


def _with_sharding(mesh: Mesh, leaf: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _params(model_config: ModelConfig, quantize: str | None, shard: Callable) -> dict:
    """Returns the shapes of the parameters with the shardings that `vl3_jax.load` gives them."""
    abstract = abstract_serving_params(model_config, "bfloat16", quantize)
    return jax.tree.map(shard, abstract, serving_axes(model_config, quantize))


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes on a chip of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
