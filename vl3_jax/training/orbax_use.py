"""Orbax as a run uses it: failures that are raised and not printed, and readers that wait for no other process."""

import contextlib
import logging
import sys
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

_LOOP_CLOSED = "Event loop is closed"


@contextlib.contextmanager
def raised_errors_only() -> Iterator[None]:
    """Leaves out what the threads of a checkpoint print of a failure, which is hundreds of lines for a full disk.

    The failure itself is raised where the checkpoint is waited for.
    """
    logger, hook = absl_logging.get_absl_logger(), sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != _LOOP_CLOSED:  # writes that were given up end after the loop that began them
            hook(unraisable)

    logger.addFilter(_is_not_raised)
    sys.unraisablehook = report
    try:
        yield
    finally:
        logger.removeFilter(_is_not_raised)
        sys.unraisablehook = hook


def _is_not_raised(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


@contextlib.contextmanager
def own_checkpointer() -> Iterator[ocp.Checkpointer]:
    """Yields a reader of this process alone: where one process fails, the others do not wait for it."""
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"process_{rank}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        params=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        training=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer
