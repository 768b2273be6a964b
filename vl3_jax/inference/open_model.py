"""Opens a checkpoint of any format as a `ChatModel`: what `vl3_jax.load` is."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vl3_jax.errors import InputError
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.tokenizer import MASK

if TYPE_CHECKING:
    import jax

QUANTIZATIONS = ("int8",)  # of weights, and of the key/value cache


def load(
    source: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: "jax.sharding.Mesh | None" = None,
    quantize: str | None = None,
    kv_cache: str | None = None,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    token: str | None = None,
    quiet: bool = True,
    on_status: Callable[[str], None] = lambda line: None,
) -> ChatModel:
    """Loads a checkpoint of any format for inference. A Sa2VA is loaded as a `GroundedModel`, which draws objects too.

    Args:
      source: An Orbax folder, a training workdir, a Hugging Face folder (read in place), or a Hub id.
      dtype: "float32" or "bfloat16", the type of weights and activations; by default float32 on a CPU, else bfloat16.
        Embeddings that are stored in bfloat16 stay so.
      mesh: A mesh that shards the parameters over several devices (`vl3_jax.parallel.mesh.make_mesh`).
      quantize: "int8" stores the layers' weights in int8 (see `vl3_jax.model.quantize`).
      kv_cache: "int8" stores the keys and values of a conversation in int8, about half of bfloat16's memory.
      adapters: Folders of PEFT, or Hub ids, with LoRA adapters of the decoder, by the names that requests choose; they
        are not merged into the weights, and requests with different ones are answered side by side.
      token: Access token of a private Hub repository.
      quiet: Whether to hide the progress bar.
      on_status: Called with a line of text before something slow.

    Raises:
      InputError: The checkpoint does not exist, is incomplete, or has no tokenizer; an adapter does not fit it; or the
        model needs more memory than there is.
    """
    import jax
    import jax.numpy as jnp

    from vl3_jax import compilation_cache
    from vl3_jax.checkpoint import chat_config, open_source
    from vl3_jax.checkpoint import load as load_checkpoint
    from vl3_jax.checkpoint.adapter_stacks import load_adapters, with_adapters
    from vl3_jax.checkpoint.tensors import float_dtype
    from vl3_jax.inference.memory import Demand, ModelMemory, weight_shards
    from vl3_jax.model import VideoLLaMA3
    from vl3_jax.sa2va.sa2va_config import Sa2vaConfig

    start = time.perf_counter()
    for name, value in (("quantize", quantize), ("kv_cache", kv_cache)):
        if value not in (None, *QUANTIZATIONS):
            raise InputError(f"{name} is {value!r}: use {' or '.join(QUANTIZATIONS)}, or leave it out")
    demand = Demand(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"), quantize, kv_cache)
    opened = open_source(source, token=token)
    config = chat_config(opened)
    processor = Processor.from_folder(opened.files)
    memory = ModelMemory(opened, demand, weight_shards(mesh))
    stacks = load_adapters(adapters or {}, config, dtype=float_dtype(demand.dtype), mesh=mesh, token=token)
    memory.check_loading()
    try:
        checkpoint = load_checkpoint(
            opened, dtype=demand.dtype, mesh=mesh, quiet=quiet, serving=True, quantize=quantize
        )
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        raise memory.explained(error) from error
    generation_config = GenerationConfig.read(checkpoint.files, processor.tokenizer.stop_ids)
    normalisation = {"image_mean": processor.config.image_mean, "image_std": processor.config.image_std}
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **normalisation))
    cache_dtype = None if kv_cache is None else jnp.int8
    model = VideoLLaMA3(config, dtype=demand.dtype, serving=True, cache_dtype=cache_dtype)
    joined = isinstance(opened.config, Sa2vaConfig)
    engine = Engine(
        model,
        with_adapters(checkpoint.params, stacks),
        generation_config.stop_ids,
        on_status,
        mesh,
        programs_folder=compilation_cache.programs_folder(),
        memory=memory,
        adapters=tuple(adapters or ()),
        watched=processor.tokenizer.id_of(MASK) if joined else None,
    )
    if not joined:
        return ChatModel(engine, processor, generation_config, time.perf_counter() - start)
    from vl3_jax.inference.grounded_model import GroundedModel
    from vl3_jax.inference.mask_drawer import load_drawer

    drawer = load_drawer(opened, demand.dtype, mesh)
    return GroundedModel(engine, processor, generation_config, drawer, time.perf_counter() - start)
