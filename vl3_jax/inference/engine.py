"""The engine: requests in, tokens out, any number of them side by side in a few compiled programs of static shape.

The engine has a fixed number of rows. A request waits for a free row, its images and frames go through the tower, its
prompt is read into its row of the cache part by part, and then it generates a few tokens in each call of the decoder
together with all other rows. Requests join and leave between calls. What a row holds stays there until somebody else
needs the row: a request whose prompt begins with the same tokens continues behind them.

    generation = engine.submit(Request(sample, SamplingConfig(max_new_tokens=64)))
    for tokens in generation: ...                  # runs the engine, for all requests
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.buckets import (
    SMALLEST_PART,
    bucket_sizes,
    part_sizes,
    power_of_two,
    prompt_parts,
    round_up_to_bucket,
    slots_for,
)
from vl3_jax.inference.compiled_programs import Call, CompiledPrograms
from vl3_jax.inference.memory import ModelMemory
from vl3_jax.inference.program_store import ProgramStore
from vl3_jax.inference.programs import STEPS_PER_CALL, VISION_ARRAYS, DecodeRows, PromptPart
from vl3_jax.inference.requests import Generation, Request
from vl3_jax.inference.sampling import SamplingParams
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.inference.vision_cache import (
    FeatureCache,
    Frame,
    frame_batches,
    frames_of,
    pack_frames,
    token_identities,
)
from vl3_jax.model import VideoLLaMA3
from vl3_jax.parallel.rules import target_device
from vl3_jax.processing.processor_config import MERGES

# Tokens of a prompt that take about as long as a call of the decoder, and what a call costs besides its tokens, in
# tokens: a CPU computes few numbers in the time in which it reads one of the weights.
_CPU_TOKENS, _CPU_OVERHEAD = 64, 32
_TOKENS, _OVERHEAD = 1024, 256
_PATCHES_PER_TOKEN = 4  # patches that the tower takes in the time of a token of the decoder
_IDLE = SamplingConfig()


@dataclasses.dataclass(eq=False)
class _Row:
    """A row of the cache: what it holds, and the request that it belongs to.

    Attributes:
      index: Its number.
      held: [n] int64, the identities of the tokens in the cache (`token_identities`).
      used: When it was used last.
      generation: The request, None while the row is free.
      work: Encodes and reads the prompt, piece by piece; None when all is read.
      fresh: Whether no token has been asked for yet.
    """

    index: int
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0
    generation: Generation | None = None
    work: Iterator[int] | None = None
    fresh: bool = False

    @property
    def decodes(self) -> bool:
        return self.generation is not None and self.work is None


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
    ):
        self.model = model
        self.params = jax.tree.map(jnp.asarray, params)
        self.stop_ids = tuple(stop_ids)
        self.mesh = mesh
        self.slots = slots or 0
        self.features = FeatureCache()
        store = ProgramStore(programs_folder) if programs_folder is not None else None
        self._programs = CompiledPrograms(model, self.params, len(self.stop_ids), mesh, on_status, store)
        self._memory = memory
        self._state = None
        self._rows = [_Row(index) for index in range(rows)]
        self._waiting: collections.deque[Generation] = collections.deque()
        self._lock = threading.RLock()
        self._clock = 0
        text = model.config.text
        # Arithmetic of attention to one token, relative to that of the weights for one token.
        per_layer = text.hidden_size * (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim
        per_layer += 3 * text.hidden_size * text.intermediate_size
        self._attention_share = 2 * text.num_heads * text.head_dim / per_layer

    @property
    def rows(self) -> int:
        """Number of requests that are answered side by side."""
        return len(self._rows)

    @property
    def compiled_programs(self) -> int:
        """Number of programs that were made ready, compiled or read from the cache on disk."""
        return self._programs.count

    def submit(self, request: Request) -> Generation:
        """Adds a request. Nothing runs before the engine does: iterate over the result, or call `step`.

        Raises:
          InputError: The prompt and its answer exceed the model's context, or the memory; others are not affected.
        """
        prompt, new = len(request.sample.tokens), request.sampling.max_new_tokens
        context = self.model.config.text.max_position_embeddings
        if prompt + new > context:
            raise InputError(
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
            if self._state is not None:
                grow = self._programs.grow_state(self.rows, self.slots, rows, slots)
                self._state = grow(self._state)
            self._rows += [_Row(index) for index in range(self.rows, rows)]
            self.slots = slots

    def forget(self) -> None:
        """Drops what free rows hold of earlier requests, and all vision features."""
        with self._lock:
            self.features = FeatureCache()
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
            size, programs = (self.rows, self.slots), self._programs
            sizes = {part for start in range(0, tokens, SMALLEST_PART) for part in part_sizes(start, self._part_limit)}
            calls = [(programs.empty_state, *size), *((programs.prefill, *size, part) for part in sizes)]
            top = {0, *map(self._top, range(1, logprobs + 1))}
            calls += [(programs.decode, *size, count, greedy) for count in top for greedy in (True, False)]
            if patches:
                buckets = itertools.takewhile(lambda bucket: bucket <= round_up_to_bucket(patches), bucket_sizes())
                calls += [(programs.encode, bucket, merge) for bucket in buckets for merge in MERGES]
            programs.make_ready(calls)

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
            sample = generation.request.sample
            frames = list(frames_of(sample))
            identities = token_identities(sample, frames)
            needed = len(identities) + generation.request.sampling.max_new_tokens
            self.reserve(slots=slots_for(needed, self.model.config.text.max_position_embeddings))
            free = [row for row in self._rows if row.generation is None]
            # The last token of the prompt is decoded, not read: it gives the first one of the answer.
            common = {row.index: _common(row.held, identities[:-1]) for row in free}
            # A conversation goes on in its row; one that shares only its beginning with others takes the oldest row.
            continued = {row.index: common[row.index] if 2 * common[row.index] >= len(row.held) else 0 for row in free}
            row = max(free, key=lambda row: (continued[row.index], -row.used))
            self._clock += 1
            row.generation, row.used, row.fresh = generation, self._clock, True
            generation.reused_tokens = common[row.index]
            row.work = self._work(row, frames, identities)

    def _abandon(self, error: BaseException) -> None:
        """Ends the requests that have a row with an error that came from the devices or from outside (Ctrl-C)."""
        for row in self._rows:
            if row.generation is not None and not row.generation.done:
                row.generation.error = error
            row.generation = row.work = None
        leaves = jax.tree.leaves(self._state)
        if any(leaf.is_deleted() for leaf in leaves):  # given to a program that did not return
            self._state = None
            for row in self._rows:
                row.held = row.held[:0]

    # Prompts

    def _read_prompts(self) -> None:
        """Encodes and reads prompts: a little where somebody waits for the next token, else those of all rows."""
        streamed = any(row.decodes and row.generation.request.streams for row in self._rows if row.generation)
        budget = self._step_tokens
        for row in sorted((row for row in self._rows if row.work is not None), key=lambda row: row.used):
            while row.work is not None and row.generation is not None and not row.generation.done:
                start, compiled = time.perf_counter(), self._programs.seconds
                cost = next(row.work, None)
                compiled = self._programs.seconds - compiled
                self._add_seconds("prefill", [row], time.perf_counter() - start - compiled)
                if cost is None:
                    row.work = None
                    continue
                budget -= cost
                if streamed and budget <= 0:
                    return

    def _work(self, row: _Row, frames: Sequence[Frame], identities: np.ndarray) -> Iterator[int]:
        """Encodes what a prompt shows and reads the prompt into a row, in pieces; yields the cost of each in tokens."""
        generation = row.generation
        assert generation is not None
        sample, start, end = generation.request.sample, generation.reused_tokens, len(identities) - 1
        row.held = row.held[:start]
        vision = np.cumsum(sample.is_vision) - 1  # vision tokens up to each position
        first_new = vision[start - 1] + 1 if start else 0
        kept = np.cumsum([0, *(int(frame.keep.sum()) for frame in frames)])
        needed = [frame for frame, last in zip(frames, kept[1:], strict=True) if last > first_new]
        parts = list(prompt_parts(start, end, self._part_limit, self._overhead))
        self._prepare(generation, needed, parts)
        features: dict[bytes, np.ndarray] = {}
        missing = {}
        for frame in needed:
            found = self.features.get(frame.digest)
            if found is None:
                missing[frame.digest] = frame
            else:
                features[frame.digest] = found
        for batch in frame_batches(list(missing.values()), self._most_patches):
            features |= self._encode(batch)
            patches = sum(len(frame.visual.patches) for frame in batch)
            generation.encoded_patches += patches
            yield -(-patches // _PATCHES_PER_TOKEN)
        width, dtype = self.model.config.text.hidden_size, jnp.dtype(self.model.dtype)
        shown = [features[frame.digest][frame.keep] for frame in needed]
        skipped = int(kept[len(frames) - len(needed)])  # vision tokens of the frames in front of them
        values = np.concatenate(shown) if shown else np.zeros((0, width), dtype)
        for begin, size in parts:
            span = slice(begin, min(begin + size, end))
            count = span.stop - span.start
            tokens, segment_ids, slot = (np.zeros((1, size), np.int32) for _ in range(3))
            tokens[0, :count], segment_ids[0, :count] = sample.tokens[span], 1
            is_vision = np.zeros(size, bool)
            is_vision[:count] = sample.is_vision[span]
            slot[0] = np.where(is_vision, np.arange(size), -1)
            part = np.zeros((1, size, width), dtype)
            part[0, is_vision] = values[vision[span][is_vision[:count]] - skipped]
            positions = begin + np.arange(size, dtype=np.int32)[None]
            program = self._programs.prefill(self.rows, self.slots, size)
            arguments = (PromptPart(tokens, part, slot, segment_ids, positions), np.int32(row.index), np.int32(begin))
            self._state = jax.block_until_ready(program(self.params, self._ready_state(), *arguments))
            row.held = identities[: span.stop]
            yield size

    def _encode(self, frames: Sequence[Frame]) -> dict[bytes, np.ndarray]:
        """Runs the tower over frames of one size and returns the features of each by digest."""
        visual = frames[0].visual
        bucket = self._bucket(frames)
        batch = pack_frames(frames, bucket)
        program = self._programs.encode(bucket, visual.merge)
        output = np.asarray(program(self.params, *(batch[name] for name in VISION_ARRAYS)))[0]
        encoded = {}
        for index, frame in enumerate(frames):
            tokens = output[index * visual.tokens_per_frame : (index + 1) * visual.tokens_per_frame].copy()
            self.features.put(frame.digest, tokens)
            encoded[frame.digest] = tokens
        return encoded

    def _prepare(self, generation: Generation, frames: Sequence[Frame], parts: Sequence[tuple[int, int]]) -> None:
        """Compiles what a request needs, before its first token and in parallel."""
        missing = {frame.digest: frame for frame in frames if self.features.get(frame.digest) is None}
        size, programs = (self.rows, self.slots), self._programs
        calls: list[Call] = [(programs.empty_state, *size)] if self._state is None else []
        for batch in frame_batches(list(missing.values()), self._most_patches):
            calls.append((programs.encode, self._bucket(batch), batch[0].visual.merge))
        calls += [(programs.prefill, *size, part) for _, part in parts]
        sampling = generation.request.sampling
        calls.append((programs.decode, *size, self._top(sampling.logprobs), sampling.temperature == 0))
        before = programs.seconds
        programs.make_ready(calls)
        self._add_seconds("compile", self._rows, programs.seconds - before)

    def _ready_state(self):
        if self._state is None:
            self._state = self._programs.empty_state(self.rows, self.slots)()
        return self._state

    # Tokens

    def _decode(self) -> None:
        """Generates a few tokens for every row whose prompt is read."""
        decoding = [(row, row.generation) for row in self._rows if row.generation and row.decodes]
        decoding = [(row, generation) for row, generation in decoding if not generation.done]
        if not decoding:
            return
        token, remaining = np.zeros((2, self.rows), np.int32)
        active, fresh = np.zeros((2, self.rows), bool)
        settings = [_IDLE] * self.rows
        for row, generation in decoding:
            sampling, written = generation.request.sampling, generation.tokens
            token[row.index] = written[-1] if written else generation.request.sample.tokens[-1]
            remaining[row.index] = sampling.max_new_tokens - len(written)
            active[row.index], fresh[row.index], settings[row.index] = True, row.fresh, sampling
        # Who reads along sees the first token at once.
        begins = any(row.fresh and generation.request.streams for row, generation in decoding)
        steps = 1 if begins else min(STEPS_PER_CALL, int(remaining.max()))
        top = max(self._top(setting.logprobs) for setting in settings)
        greedy = all(setting.temperature == 0 for setting in settings)
        program = self._programs.decode(self.rows, self.slots, top, greedy)
        start = time.perf_counter()
        length = np.array([len(row.held) for row in self._rows], np.int32)
        rows = DecodeRows(length, token, active, fresh, remaining, SamplingParams.of(settings))
        stop_ids = np.asarray(self.stop_ids, np.int32)
        self._state, *outputs = program(self.params, self._ready_state(), rows, stop_ids, np.int32(steps))
        tokens, counts = (np.asarray(output) for output in outputs[:2])
        most_likely = [np.asarray(output) for output in outputs[2:] if output is not None]
        self._add_seconds("decode", (row for row, _ in decoding), time.perf_counter() - start)
        for row, generation in decoding:
            row.fresh = False
            new = tokens[row.index, : counts[row.index]]
            # The newest token is not in the cache yet.
            row.held = np.concatenate([row.held, token[row.index, None], new[:-1]]).astype(np.int64)
            count = settings[row.index].logprobs
            for step, token_id in enumerate(new.tolist()):
                if generation.done:  # a stop string; what follows is dropped
                    break
                columns = [array[row.index, step, :count].tolist() for array in most_likely]
                generation.add(token_id, list(zip(*columns, strict=True)))

    # Sizes

    @property
    def _on_cpu(self) -> bool:
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            return target_device().platform == "cpu"

    @property
    def _step_tokens(self) -> int:
        return _CPU_TOKENS if self._on_cpu else _TOKENS

    @property
    def _overhead(self) -> int:
        return _CPU_OVERHEAD if self._on_cpu else _OVERHEAD

    @property
    def _most_patches(self) -> int:
        return _PATCHES_PER_TOKEN * (self._step_tokens if self.rows > 1 else _TOKENS)

    def _part_limit(self, start: int) -> float:
        """Returns the tokens, behind `start` others, that are read in about the time of a call of the decoder.

        A single row has nobody to wait for it.
        """
        return _TOKENS if self.rows == 1 else self._step_tokens / (1 + self._attention_share * start)

    def _bucket(self, frames: Sequence[Frame]) -> int:
        return round_up_to_bucket(sum(len(frame.visual.patches) for frame in frames))

    def _top(self, logprobs: int) -> int:
        """Returns the number of most likely tokens of the program that gives at least so many."""
        return min(power_of_two(logprobs), self.model.config.text.vocab_size) if logprobs else 0

    def _add_seconds(self, phase: str, rows: Iterable[_Row], seconds: float) -> None:
        for row in rows:
            if row.generation is not None:
                timings = row.generation.timings
                setattr(timings, phase, getattr(timings, phase) + seconds)


def _common(held: np.ndarray, prompt: np.ndarray) -> int:
    """Returns the number of tokens with which both begin."""
    size = min(len(held), len(prompt))
    differ = np.flatnonzero(held[:size] != prompt[:size])
    return int(differ[0]) if differ.size else size
