"""Reads prompts into the rows of the cache, piece by piece: images and frames through the tower, then the tokens."""

import functools
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from vl3_jax.inference.buckets import prompt_parts, round_up_to_bucket
from vl3_jax.inference.device_state import DeviceState
from vl3_jax.inference.pace import Pace
from vl3_jax.inference.programs import PromptPart
from vl3_jax.inference.requests import Generation
from vl3_jax.inference.rows import CacheRow
from vl3_jax.inference.vision_cache import FeatureCache, Frame, frame_batches, pack_frames


class PromptReader:
    """Does the work of prompts.

    Args:
      device: What runs the programs.
      features: Vision features of earlier prompts.
      pace: Sizes of the pieces.
    """

    def __init__(self, device: DeviceState, features: FeatureCache, pace: Pace):
        self._device, self._features, self._pace = device, features, pace

    def work(self, row: CacheRow, generation: Generation) -> Iterator[None]:
        """Encodes what a prompt shows and reads the prompt into a row, in pieces; yields after each.

        Args:
          row: The row, which holds the first `generation.reused_tokens` tokens already.
          generation: The request.
        """
        device, request = self._device, generation.request
        sample, frames, identities = request.sample, request.frames, request.identities
        start, end = generation.reused_tokens, len(identities) - 1
        shown = np.full(len(identities), -1)  # the vision token at each position
        shown[sample.is_vision] = sample.vision_order
        sizes = [int(frame.keep.sum()) for frame in frames]
        frame_of = np.repeat(np.arange(len(frames)), sizes)  # each vision token's
        new = np.unique(frame_of[shown[start:][sample.is_vision[start:]]])
        needed = [frames[number] for number in new]
        awaited = device.rows > 1 and request.streams
        limit = functools.partial(self._pace.part_limit, awaited)
        parts = list(prompt_parts(start, end, limit, self._pace.overhead))
        found = {frame.digest: self._features.get(frame.digest) for frame in needed}
        features = {digest: values for digest, values in found.items() if values is not None}
        missing = {frame.digest: frame for frame in needed if frame.digest not in features}
        batches = list(frame_batches(list(missing.values()), self._pace.most_patches(awaited)))
        self._compile(generation, batches, [size for _, size in parts])
        for batch in batches:
            features |= self._encode(batch)
            patches = sum(len(frame.visual.patches) for frame in batch)
            generation.encoded_patches += patches
            yield
        width, dtype = device.model.config.text.hidden_size, jnp.dtype(device.model.dtype)
        values = [features[frame.digest][frame.keep] for frame in needed]
        values = np.concatenate(values or [np.zeros((0, width), dtype)])
        place = np.cumsum(np.isin(frame_of, new)) - 1  # of each vision token among the values
        for begin, size in parts:
            span = slice(begin, min(begin + size, end))
            count = span.stop - span.start
            is_vision, tokens = sample.is_vision[span], np.zeros((1, size), np.int32)
            tokens[0, :count] = np.where(is_vision, -1, sample.tokens[span])
            part = np.zeros((1, size, width), dtype)
            part[0, :count][is_vision] = values[place[shown[span][is_vision]]]
            device.prefill(PromptPart(tokens, part, np.array([row.index, begin, count, row.adapter], np.int32)))
            row.held = identities[: span.stop]
            yield

    def _compile(self, generation: Generation, batches: Sequence[Sequence[Frame]], sizes: Sequence[int]) -> None:
        """Compiles what a request needs, before its first token and in parallel."""
        device, sampling = self._device, generation.request.sampling
        calls = [device.decode_call(sampling.logprobs, sampling.temperature == 0)]  # what takes longest begins first
        calls += [device.prefill_call(size) for size in sizes]
        calls += [(device.programs.encode, _bucket(batch), batch[0].visual.merge) for batch in batches]
        calls += device.state_calls()
        device.programs.make_ready(calls)

    def _encode(self, frames: Sequence[Frame]) -> dict[bytes, np.ndarray]:
        """Runs the tower over frames of one size and returns the features of each by digest."""
        visual = frames[0].visual
        output = self._device.encode(pack_frames(frames, _bucket(frames)), visual.merge)
        encoded = {}
        for index, frame in enumerate(frames):
            tokens = output[index * visual.tokens_per_frame : (index + 1) * visual.tokens_per_frame].copy()
            self._features.put(frame.digest, tokens)
            encoded[frame.digest] = tokens
        return encoded


def _bucket(frames: Sequence[Frame]) -> int:
    return round_up_to_bucket(sum(len(frame.visual.patches) for frame in frames))
