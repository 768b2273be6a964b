"""XLA flags for training, grouped by purpose, and the environment variables that set them.

    export "$(python -m vl3_jax.parallel.xla_flags v5e)"

The flags are recommended by their sources and were not measured here; the compiler's defaults are a reasonable choice,
too. libtpu 0.0.42.1 and 0.0.50.1 and jaxlib 0.10.2 and 0.12.0 accept them. Other versions may know fewer flags, and
exit with the name of the first unknown one. Flags that the environment already holds come last and take precedence.

Sources:
  OpenXLA     openxla.org/xla/flags_guidance
  MaxText     github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py
  JAX         docs.jax.dev, "GPU performance tips"
  NVIDIA      docs.nvidia.com/jax-toolbox, "Tips for High-Performance LLMs with JAX and XLA"
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from vl3_jax.errors import InputError

Flags = Mapping[str, str]

# Overlaps the all-gathers of fsdp weights with matrix products. Mostly defaults. OpenXLA, MaxText (CF_FOR_ALL_GATHER).
OVERLAP_ALL_GATHER: Flags = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}

# Fuses all-gathers with the matrix products around them. libtpu 0.0.50 refuses these flags on anything but a v5e, where
# they can hang or give wrong results. OpenXLA ("v5e/Async"), MaxText (CF_FOR_ALL_GATHER).
FUSE_ALL_GATHER: Flags = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
}

# The same for all-reduces of gradients over `data`. Not a default. OpenXLA ("v5e/Async"), MaxText (CF_FOR_ALL_REDUCE).
FUSE_ALL_REDUCE: Flags = {
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
}

# On-chip memory that one operation may use, in KiB; the rest holds prefetched data. The default is 16 MiB. For the
# 128 MiB of a v6e and compute-bound models. MaxText (DENSE_VMEM_LIMIT_FLAG); meaning of the flag: OpenXLA.
LARGE_SCRATCHPAD: Flags = {"xla_tpu_scoped_vmem_limit_kib": "98304"}

# Several slices: overlaps the all-reduces of gradients over the data-centre network with the backward pass, also for
# gradients of different sizes. Can take more memory. OpenXLA ("TPU XLA flags"), MaxText (DATA_PARALLEL_OVERLAP).
ACROSS_SLICES: Flags = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

# GPU: overlaps collectives with kernels, also across iterations of the loop over layers. JAX, NVIDIA.
GPU_OVERLAP: Flags = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    "xla_gpu_enable_while_loop_double_buffering": "true",
}

# GPU: combines small collectives up to these bytes, so that a layer's weights are one all-gather. JAX, NVIDIA.
GPU_COMBINE: Flags = {
    "xla_gpu_all_gather_combine_threshold_bytes": "1073741824",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "1073741824",
    "xla_gpu_all_reduce_combine_threshold_bytes": "1073741824",
}

GPU = "gpu"
# By generation; a flag that occurs in two groups is set once.
GENERATIONS: Mapping[str, Sequence[Flags]] = {
    "v5e": (OVERLAP_ALL_GATHER, FUSE_ALL_GATHER, FUSE_ALL_REDUCE),
    "v5p": (OVERLAP_ALL_GATHER,),
    "v6e": (OVERLAP_ALL_GATHER, LARGE_SCRATCHPAD),
    GPU: (GPU_OVERLAP, GPU_COMBINE),
}


def environment(generation: str, slices: int = 1, existing: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment variable with the flags of a generation, to be set before JAX starts.

    Args:
      generation: TPU generation or GPUs: "v5e", "v5p", "v6e" or "gpu".
      slices: Number of TPU slices, connected by the data-centre network.
      existing: Existing environment, whose flags follow the recommended ones; None uses that of this process.

    Returns:
      {"LIBTPU_INIT_ARGS": "--flag=value ..."}, or for GPUs {"XLA_FLAGS": "--flag=value ..."}.

    Raises:
      InputError: The generation is unknown.
    """
    if generation not in GENERATIONS:
        raise InputError(f"unknown generation {generation!r}: give one of {', '.join(GENERATIONS)}")
    groups = [*GENERATIONS[generation], *([ACROSS_SLICES] if slices > 1 and generation != GPU else [])]
    flags = {name: value for group in groups for name, value in group.items()}
    variable = "XLA_FLAGS" if generation == GPU else "LIBTPU_INIT_ARGS"
    existing_flags = (os.environ if existing is None else existing).get(variable, "").split()
    return {variable: " ".join([*(f"--{name}={value}" for name, value in flags.items()), *existing_flags])}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints `VARIABLE=value` for a shell and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="xla_flags", description="Prints XLA flags for training as VARIABLE=value, for `export`."
    )
    parser.add_argument("generation", help=", ".join(GENERATIONS))
    parser.add_argument(
        "--slices", type=int, default=1, metavar="N", help="number of TPU slices in the job (default: 1)"
    )
    arguments = parser.parse_args(argv)
    try:
        variables = environment(arguments.generation, arguments.slices)
    except InputError as error:
        print(f"xla_flags: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}={value}" for name, value in variables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
