"""The engine: requests in, tokens out, any number of them side by side in a few compiled programs of static shape.

The engine has a fixed number of rows. A request waits for a free row, its images and frames go through the tower, its
prompt is read into its row of the cache part by part, and then it generates a few tokens in each call of the decoder
together with all other rows. Requests join and leave between calls. What a row holds stays there until somebody else
needs the row: a request whose prompt begins with the same tokens continues behind them.

    generation = engine.submit(Request(sample, SamplingConfig(max_new_tokens=64)))
    for tokens in generation: ...                  # runs the engine, for all requests
"""

import collections
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.errors import InputError, TooLongError
from vl3_jax.inference.buckets import SMALLEST_PART, bucket_sizes, part_sizes, round_up_to_bucket, slots_for
from vl3_jax.inference.compiled_programs import CompiledPrograms
from vl3_jax.inference.decode_call import keep_allowed, next_call
from vl3_jax.inference.device_state import DeviceState
from vl3_jax.inference.memory import ModelMemory
from vl3_jax.inference.pace import Pace
from vl3_jax.inference.program_store import ProgramStore
from vl3_jax.inference.prompt_reader import PromptReader
from vl3_jax.inference.requests import Generation, Request
from vl3_jax.inference.rows import CacheRow, best_row
from vl3_jax.inference.vision_cache import FeatureCache
from vl3_jax.model import VideoLLaMA3
from vl3_jax.processing.processor_config import MERGES

_END = object()  # of a prompt's work
_READING_SHARE = 0.75  # of the time of a call of the decoder that reading may take before the next one


class Engine:
    """A model with its parameters, ready to answer requests. It may be used from several threads.

    Args:
      model: The model's structure and activation type.
      params: Parameters as plain nested dicts, on the devices where they are used.
      stop_ids: Tokens that end an answer.
      on_status: Called with a line of text before something slow (compilation).
      mesh: The mesh over which the parameters are sharded; None on one device.
      rows: Requests that are answered side by side; `reserve` adds more.
      slots: Tokens of prompt and answer that a row holds; None begins with what the first request needs. A request that
        needs more makes all rows longer.
      programs_folder: Where compiled programs are kept for later processes; None keeps none.
      memory: Refuses requests for which there is too little memory; None refuses none.
      adapters: Names of the LoRA adapters that the parameters have (`vl3_jax.model.adapters`), in order.
      watched: Token whose hidden states answers keep, wherever it is generated; None for none, which costs nothing.
    """

    def __init__(
        self,
        model: VideoLLaMA3,
        params: dict,
        stop_ids: Sequence[int],
        on_status: Callable[[str], None] = lambda line: None,
        mesh: jax.sharding.Mesh | None = None,
        rows: int = 1,
        slots: int | None = None,
        programs_folder: str | os.PathLike | None = None,
        memory: ModelMemory | None = None,
        adapters: Sequence[str] = (),
        watched: int | None = None,
    ):
        self.model = model
        self.params = jax.tree.map(jnp.asarray, params)
        self.stop_ids = tuple(stop_ids)
        self.adapters = tuple(adapters)
        self.features = FeatureCache()
        store = ProgramStore(programs_folder) if programs_folder is not None else None
        self.watched = watched
        self._programs = CompiledPrograms(
            model, self.params, len(self.stop_ids), mesh, on_status, store, with_hidden=watched is not None
        )
        self._device = DeviceState(model, self.params, self._programs, rows, slots or 0)
        self._pace = Pace(model.config.text, mesh)
        self._reader = PromptReader(self._device, self.features, self._pace)
        self._memory = memory
        self._rows = [CacheRow(index) for index in range(rows)]
        self._waiting: collections.deque[Generation] = collections.deque()
        self._lock = threading.RLock()
        self._clock = 0
        self._call_seconds = 0.0  # of the last call of the decoder

    @property
    def rows(self) -> int:
        """Number of requests that are answered side by side."""
        return len(self._rows)

    @property
    def slots(self) -> int:
        """Tokens of prompt and answer that a row holds."""
        return self._device.slots

    @property
    def compiled_programs(self) -> int:
        """Number of programs that were made ready, compiled or read from the cache on disk."""
        return self._programs.count

    def adapter_number(self, name: str | None) -> int:
        """Returns the number of an adapter, -1 for None; raises InputError if there is none of this name."""
        if name is not None and name not in self.adapters:
            known = f"loaded are {', '.join(self.adapters)}" if self.adapters else "the model was loaded without any"
            raise InputError(f"there is no adapter {name!r}; {known}")
        return -1 if name is None else self.adapters.index(name)

    def submit(self, request: Request) -> Generation:
        """Adds a request. Nothing runs before the engine does: iterate over the result, or call `step`.

        Raises:
          InputError: The prompt and its answer exceed the model's context, or the memory, or there is no such
            adapter; others are not affected.
        """
        self.adapter_number(request.adapter)
        prompt, new = len(request.sample.tokens), request.sampling.max_new_tokens
        context = self.model.config.text.max_position_embeddings
        if prompt + new > context:
            raise TooLongError(
                f"a prompt of {prompt} tokens and {new} new ones exceed the model's context of {context}: lower "
                "--max-visual-tokens, --max-frames or --max-new-tokens, or shorten the text"
            )
        if not prompt or request.sample.is_vision[-1]:
            raise ValueError("a prompt ends with a token of text, behind which the answer starts")
        slots = slots_for(prompt + new, context)
        if self._memory and slots > self.slots:
            self._memory.check_room(self.rows, slots)
        generation = Generation(request, self, logprobs=[] if request.sampling.logprobs else None)
        self._waiting.append(generation)
        return generation

    def run(self, requests: Iterable[Request]) -> list[Generation]:
        """Answers several requests side by side and returns their complete answers in order."""
        generations = [self.submit(request) for request in requests]
        return [generation.result() for generation in generations]

    def reserve(self, rows: int = 1, slots: int = 0) -> None:
        """Makes room for so many rows and slots, if there are fewer. What the rows hold stays.

        Raises:
          InputError: There is too little memory for them.
        """
        with self._lock:
            rows, slots = max(rows, self.rows), max(slots, self.slots)
            if (rows, slots) == (self.rows, self.slots):
                return
            if self._memory:
                self._memory.check_room(rows, slots)
            self._device.grow(rows, slots)
            self._rows += [CacheRow(index) for index in range(self.rows, rows)]

    def forget(self) -> None:
        """Drops what free rows hold of earlier requests, and all vision features."""
        with self._lock:
            self.features.clear()
            for row in self._rows:
                if row.generation is None:
                    row.held = row.held[:0]

    def warm_up(self, tokens: int, patches: int = 0, logprobs: int = 0) -> None:
        """Compiles, in parallel, all programs that requests of up to these sizes need.

        Args:
          tokens: Tokens of prompt and answer.
          patches: Patches of one image or frame at most, and of a video's frames together if they are fewer than the
            tower takes at once; 0 for text alone.
          logprobs: Most likely tokens at each position at most.
        """
        with self._lock:
            self.reserve(slots=slots_for(tokens, self.model.config.text.max_position_embeddings))
            device, starts = self._device, range(0, tokens, SMALLEST_PART)
            limits = [functools.partial(self._pace.part_limit, awaited) for awaited in (False, True)]
            sizes = {part for limit in limits for start in starts for part in part_sizes(start, limit)}
            calls = [*device.state_calls(), *map(device.prefill_call, sizes)]
            calls += [device.decode_call(count, greedy) for count in range(logprobs + 1) for greedy in (True, False)]
            if patches:
                buckets = itertools.takewhile(lambda bucket: bucket <= round_up_to_bucket(patches), bucket_sizes())
                calls += [(self._programs.encode, bucket, merge) for bucket in buckets for merge in MERGES]
            self._programs.make_ready(calls)

    def step(self, awaited: Generation | None = None) -> bool:
        """Reads parts of prompts and generates a few tokens for every row that is ready.

        Args:
          awaited: A request; nothing is done if another thread has added to it meanwhile.

        Returns:
          Whether there is more to do.
        """
        seen = len(awaited.tokens) if awaited is not None else 0
        with self._lock:
            if awaited is not None and (awaited.done or len(awaited.tokens) > seen):
                return True
            try:
                self._leave()
                self._join()
                self._read_prompts()
                self._decode()
                self._leave()
            except BaseException as error:
                explained = self._memory.explained(error, self.rows, self.slots) if self._memory else error
                self._abandon(explained)
                if explained is error:
                    raise
                raise explained from error
            return bool(self._waiting) or any(row.generation is not None for row in self._rows)

    # Rows

    def _leave(self) -> None:
        """Frees the rows of complete requests."""
        for row in self._rows:
            if row.generation is not None and row.generation.done:
                row.generation = row.work = None

    def _join(self) -> None:
        """Gives free rows to waiting requests, in the order of their arrival."""
        while self._waiting and any(row.generation is None for row in self._rows):
            generation = self._waiting.popleft()
            if generation.done:  # cancelled
                continue
            identities = generation.request.identities
            needed = len(identities) + generation.request.sampling.max_new_tokens
            self.reserve(slots=slots_for(needed, self.model.config.text.max_position_embeddings))
            free = [row for row in self._rows if row.generation is None]
            adapter = self.adapter_number(generation.request.adapter)
            row, common = best_row(free, identities, adapter)
            self._clock += 1
            row.generation, row.adapter, row.used, row.fresh = generation, adapter, self._clock, True
            row.ahead, row.taken_back = 1, ()
            generation.reused_tokens, row.held = common, row.held[:common]
            row.work = self._reader.work(row, generation)

    def _abandon(self, error: BaseException) -> None:
        """Ends the requests that have a row with an error that came from the devices or from outside (Ctrl-C)."""
        for row in self._rows:
            if row.generation is not None and not row.generation.done:
                row.generation.error = error
            row.generation = row.work = None
        if self._device.drop_lost():
            for row in self._rows:
                row.held = row.held[:0]

    # Prompts

    def _read_prompts(self) -> None:
        """Encodes and reads prompts: those of all rows, or a part where somebody waits for the next token.

        Such a part takes less time than the call of the decoder before, so that the token is at most twice as late.
        """
        streamed = any(row.decodes and row.generation.request.streams for row in self._rows if row.generation)
        spent = 0.0
        for row in sorted((row for row in self._rows if row.work is not None), key=lambda row: row.used):
            while row.work is not None and row.generation is not None and not row.generation.done:
                start, compiled = time.perf_counter(), self._programs.seconds
                if next(row.work, _END) is _END:
                    row.work = None
                compiled = self._programs.seconds - compiled
                seconds = time.perf_counter() - start - compiled
                self._add_seconds("compile", self._rows, compiled)
                self._add_seconds("prefill", [row], seconds)
                spent += seconds
                # The next piece takes about as long as this one.
                if streamed and spent + seconds > _READING_SHARE * self._call_seconds:
                    return

    # Tokens

    def _decode(self) -> None:
        """Generates a few tokens for every row whose prompt is read."""
        call = next_call(self._rows, self.model.config.text.vocab_size)
        if call is None:
            return
        start = time.perf_counter()
        stop_ids = np.asarray(self.stop_ids, np.int32)
        outputs = self._device.decode(call.rows, stop_ids, call.steps, call.logprobs, call.all_greedy)
        tokens, counts, hidden, most_likely = outputs
        self._call_seconds = time.perf_counter() - start
        self._add_seconds("decode", (row for row, _ in call.decoding), self._call_seconds)
        for row, generation in call.decoding:
            row.fresh = False
            new = tokens[row.index, : counts[row.index]]
            kept, end = keep_allowed(row, generation, new.tolist())
            newest = np.asarray(call.rows.token)[row.index, None]
            read = np.concatenate([newest, new])[:kept]  # the newest token is not in the cache yet
            row.held = np.concatenate([row.held, read]).astype(np.int64)
            count, before = generation.request.sampling.logprobs, len(generation.tokens)
            for step, token_id in enumerate(new[:kept].tolist()):
                if generation.done or generation.ending:  # a stop string; what follows is dropped
                    break
                columns = [array[row.index, step, :count].tolist() for array in most_likely]
                likely = list(zip(*columns, strict=True))
                generation.add(token_id, likely, end if step == kept - 1 else None)
            if hidden is None:
                continue
            for step in np.flatnonzero(read == self.watched).tolist():
                if 0 <= (index := before + step - 1) < len(generation.tokens):
                    generation.add_hidden(index, np.asarray(hidden[row.index, step], np.float32))

    def _add_seconds(self, phase: str, rows: Iterable[CacheRow], seconds: float) -> None:
        for row in rows:
            if row.generation is not None:
                timings = row.generation.timings
                setattr(timings, phase, getattr(timings, phase) + seconds)
