"""What the engine has on the devices: the parameters, its programs, and the state of all rows."""

import jax
import numpy as np

from vl3_jax.inference.buckets import power_of_two
from vl3_jax.inference.compiled_programs import Call, CompiledPrograms
from vl3_jax.inference.programs import VISION_ARRAYS, DecodeRows, DecodeState, PromptPart
from vl3_jax.model import VideoLLaMA3


class DeviceState:
    """Runs the programs of the engine for its present numbers of rows and slots.

    Args:
      model: The model.
      params: Its parameters, on the devices.
      programs: The programs.
      rows: Number of rows.
      slots: Tokens that a row holds.
    """

    def __init__(self, model: VideoLLaMA3, params: dict, programs: CompiledPrograms, rows: int, slots: int):
        self.model, self.params, self.programs = model, params, programs
        self.rows, self.slots = rows, slots
        self._state: DecodeState | None = None

    def grow(self, rows: int, slots: int) -> None:
        """Makes the state larger. What the rows hold stays."""
        if self._state is not None:
            self._state = self.programs.grow_state(self.rows, self.slots, rows, slots)(self._state)
        self.rows, self.slots = rows, slots

    def drop_lost(self) -> bool:
        """Returns whether the state was given to a program that did not return; the next one is then empty."""
        lost = any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))
        if lost:
            self._state = None
        return lost

    # What is to be compiled

    def state_calls(self) -> list[Call]:
        """Returns the calls that compile what makes the state, if there is none yet."""
        return [(self.programs.empty_state, self.rows, self.slots)] if self._state is None else []

    def prefill_call(self, size: int) -> Call:
        """Returns the call that compiles `prefill` for parts of so many tokens."""
        return self.programs.prefill, self.rows, self.slots, size

    def decode_call(self, logprobs: int, all_greedy: bool) -> Call:
        """Returns the call that compiles `decode` for at least so many of the most likely tokens."""
        return self.programs.decode, self.rows, self.slots, self._top(logprobs), all_greedy

    # What is run

    def encode(self, batch: dict[str, np.ndarray], merge: int) -> np.ndarray:
        """Returns the vision tokens [T, D] of `pack_frames`."""
        program = self.programs.encode(batch["patches"].shape[-2], merge)
        return np.asarray(program(self.params, *(batch[name] for name in VISION_ARRAYS)))[0]

    def prefill(self, part: PromptPart) -> None:
        """Writes a part of a prompt into the cache."""
        program = self.programs.prefill(self.rows, self.slots, part.tokens.shape[1])
        self._state = jax.block_until_ready(program(self.params, self._ready_state(), part))

    def decode(
        self, rows: DecodeRows, stop_ids: np.ndarray, steps: int, logprobs: int, all_greedy: bool
    ) -> tuple[np.ndarray, np.ndarray, jax.Array | None, list[np.ndarray]]:
        """Generates tokens for all active rows.

        Returns:
          The results of `decode_steps` behind the state: the hidden states stay on the devices; ids and values of the
          most likely tokens are in a list, which is empty if `logprobs` is 0.
        """
        program = self.programs.decode(self.rows, self.slots, self._top(logprobs), all_greedy)
        arguments = self.params, self._ready_state(), rows, stop_ids, np.int32(steps)
        self._state, tokens, counts, hidden, *most_likely = program(*arguments)
        listed = [np.asarray(output) for output in most_likely if output is not None]
        return np.asarray(tokens), np.asarray(counts), hidden, listed

    def _ready_state(self) -> DecodeState:
        if self._state is None:
            self._state = self.programs.empty_state(self.rows, self.slots)()
        return self._state  # pyright: ignore[reportReturnType]

    def _top(self, logprobs: int) -> int:
        """Returns the number of most likely tokens of the program that gives at least so many."""
        return min(power_of_two(logprobs), self.model.config.text.vocab_size) if logprobs else 0
