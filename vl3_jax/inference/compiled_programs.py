"""The engine's programs by their sizes, each compiled once."""

import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vl3_jax.host_memory import return_freed_memory
from vl3_jax.inference import programs
from vl3_jax.inference.layered_program import compile_by_layers
from vl3_jax.inference.program_store import ProgramStore, tree_signature
from vl3_jax.inference.sampling import SAMPLING_DTYPES, SamplingParams
from vl3_jax.inference.token_masks import mask_words
from vl3_jax.inference.vision_cache import batch_shapes
from vl3_jax.model import VideoLLaMA3

_LARGE_BYTES = 2**28  # of weights, which take far longer to read than calls of the layers
Program = Callable[..., Any]
Call = tuple  # a method of `CompiledPrograms` and its arguments


class CompiledPrograms:
    """Compiles the programs of `vl3_jax.inference.programs` for the sizes that are asked for.

    Each method returns a function of the remaining arguments of the program.

    Attributes:
      seconds: Seconds spent on making programs ready.
    """

    def __init__(
        self,
        model: VideoLLaMA3,
        params: dict,
        num_stop_ids: int,
        mesh: jax.sharding.Mesh | None,
        on_status: Callable[[str], None] = lambda line: None,
        store: ProgramStore | None = None,
        compile_lowered: Callable[[str, jax.stages.Lowered], Any] = lambda name, lowered: lowered.compile(),
        with_hidden: bool = False,
    ):
        """Initialises the programs; nothing is compiled yet.

        Args:
          model: The model.
          params: Its parameters, or their shapes.
          num_stop_ids: Number of stop tokens.
          mesh: The mesh over which the parameters are sharded; None on one device.
          on_status: Called with a line of text before something is compiled.
          store: Where compiled programs are kept for later processes.
          compile_lowered: Compiles a program of this name, or does with it what else there is to do; not called for
            what is compiled by layers.
          with_hidden: Whether decoding returns hidden states.
        """
        self._model, self._mesh, self._on_status, self._store = model, mesh, on_status, store
        self._compile, self._with_hidden = compile_lowered, with_hidden
        self._params = jax.tree.map(lambda leaf: _array(leaf.shape, leaf.dtype, leaf.sharding), params)
        self._stop_ids = _array([num_stop_ids], jnp.int32)
        self._programs: dict[tuple, Program] = {}
        self._ready: set[Call] = set()
        self._lock = threading.Lock()
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """Number of programs that are ready."""
        return len(self._programs)

    def make_ready(self, calls: Iterable[Call]) -> None:
        """Makes programs ready side by side, because most of compiling needs no Python.

        Those of a large model on a CPU are made ready one after the other, because each takes memory beside the
        weights.

        Args:
          calls: Method of this class and its arguments, for each program.
        """
        start, before = time.perf_counter(), self.count
        missing = [call for call in dict.fromkeys(calls) if call not in self._ready]
        if not missing:  # as nearly always; threads take longer than a small program
            return
        with concurrent.futures.ThreadPoolExecutor(1 if self._is_large_on_cpu else os.cpu_count() or 1) as pool:
            list(pool.map(lambda call: call[0](*call[1:]), missing))
        self._ready.update(missing)
        if self.count > before:
            self.seconds += time.perf_counter() - start

    def encode(self, patches: int, merge: int) -> Program:
        """The tower over `patches` patches, see `encode_vision`."""
        arrays = batch_shapes(patches, merge)
        vision = [_array(*arrays[name]) for name in programs.VISION_ARRAYS]
        return self._get((patches, merge), programs.encode_vision, (), lambda: (self._params, *vision))

    def empty_state(self, rows: int, slots: int) -> Program:
        """Creates a state, see `empty_state`."""
        return self._get((rows, slots), programs.empty_state, (rows, slots), tuple)

    def grow_state(self, rows: int, slots: int, more_rows: int, more_slots: int) -> Program:
        """Makes a larger state from one of `rows` rows and `slots` slots, see `grow_state`."""
        static = (more_rows, more_slots)
        return self._get((rows, slots, *static), programs.grow_state, static, lambda: (self._state(rows, slots),))

    def prefill(self, rows: int, slots: int, tokens: int) -> Program:
        """Reads a part of a prompt, see `prefill`."""
        features = _array([1, tokens, self._model.config.text.hidden_size], self._model.dtype)
        part = programs.PromptPart(_array([1, tokens], jnp.int32), features, _array([4], jnp.int32))
        arguments = lambda: (self._params, self._state(rows, slots), part)  # noqa: E731
        return self._get((rows, slots, tokens), programs.prefill, (), arguments)

    def decode(self, rows: int, slots: int, logprobs: int, all_greedy: bool) -> Program:
        """Generates a few tokens, see `decode_steps`."""
        integers, flags = _array([rows], jnp.int32), _array([rows], jnp.bool_)
        sampling = SamplingParams(*(_array([rows], dtype) for dtype in SAMPLING_DTYPES))
        allowed = _array([rows, mask_words(self._model.config.text.vocab_size)], jnp.uint32)
        taken_back = _array([rows, programs.STEPS_PER_CALL - 1], jnp.int32)
        inputs = programs.DecodeRows(
            integers, integers, flags, flags, integers, integers, sampling, allowed, taken_back
        )
        others = (inputs, self._stop_ids, _array([], jnp.int32))
        static = (programs.STEPS_PER_CALL, logprobs, all_greedy)
        arguments = lambda: (self._params, self._state(rows, slots), *others, self._with_hidden)  # noqa: E731
        return self._get((rows, slots), programs.decode_steps, static, arguments)

    def _state(self, rows: int, slots: int) -> programs.DecodeState:
        """Returns the description of a state, sharded as the programs return it."""
        return programs.described_state(self._model, rows, slots, self._mesh)

    def _get(self, sizes: tuple[int, ...], function: Any, static: tuple, arguments: Callable[[], tuple]) -> Program:
        """Returns a program. `sizes` and `static` determine its `arguments`, which are described only to compile it."""
        key = (function.__name__, static, sizes)
        if key not in self._programs:
            signature = (*map(str, key), self._signature)
            program = self._store.load(self._devices, *signature) if self._store else None
            if program is None:
                self._on_status(f"compiling {function.__name__} for this size")
                mesh = jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()
                with mesh, self._store.compiling() if self._store else contextlib.nullcontext():
                    traced = function.trace(self._model, *static, *arguments())
                    # Not decoding: a product of few rows is prepared anew where its weights are others than before.
                    if self._is_large_on_cpu and function is not programs.decode_steps:
                        program = compile_by_layers(traced)
                    else:
                        program = self._compile(function.__name__, traced.lower())
                if self._store:
                    self._store.save(program, *signature)
            return_freed_memory()
            with self._lock:
                self._programs.setdefault(key, program)
        return self._programs[key]

    @functools.cached_property
    def _is_large_on_cpu(self) -> bool:
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._params))
        return self._mesh is None and self._devices[0].platform == "cpu" and weights > _LARGE_BYTES

    @property
    def _devices(self) -> list[Any]:
        return list(self._mesh.devices.flat) if self._mesh else jax.local_devices()[:1]

    @functools.cached_property
    def _signature(self) -> str:
        model = self._model
        types = jnp.dtype(model.dtype), model.cache_dtype
        described = [model.config, *types, model.serving, self._mesh, self._stop_ids.shape, self._with_hidden]
        return "\n".join([*map(str, described), tree_signature(self._params)])


def _array(shape: Sequence[int], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
