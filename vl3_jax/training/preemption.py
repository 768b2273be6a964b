"""Stops a run early, all hosts after the same step, with a checkpoint."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class PreemptionHandler:
    """Remembers SIGTERM and SIGINT while it is open, instead of being killed by them; a second SIGINT does kill.

    With several processes SIGTERM to any of them is enough: JAX's preemption service agrees on a step.
    """

    def __init__(self):
        self._signal: int | None = None
        self._previous = {}

    def __enter__(self) -> "PreemptionHandler":
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to the preemption service.
            handled = [signal.SIGINT, *([signal.SIGTERM] if jax.process_count() == 1 else [])]
            self._previous = {number: signal.signal(number, self._remember) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Returns whether to stop after this step; every process must ask after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def _remember(self, number: int, _: object) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number
