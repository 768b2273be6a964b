"""Entry point of the `vl3` command.

Each subcommand is a module of this package with two functions: `add_arguments(parser)` and
`run(arguments) -> int | None`. Only the chosen one is imported, so that `vl3 --help` is instant.
"""

import argparse
import importlib
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from vl3_jax import logs, platforms
from vl3_jax.cli import streams
from vl3_jax.errors import InputError, RunError, exit_code, printable

# Name on the command line, its line in `vl3 --help`. The module is `vl3_jax.cli.<name>`.
COMMANDS = {
    "demo": "the first command to try: asks the tiny model of this package six questions",
    "ask": "answer one question about images and videos",
    "chat": "a conversation about images and videos, in the terminal",
    "batch": "answer a file of requests in OpenAI's batch form",
    "track": "masks of objects in a video or an image, by points, boxes and masks, with SAM-2",
    "segment": "masks of what a text names in an image or a video, and descriptions of regions, with Sa2VA",
    "eval": "questions with known answers, asked in batches and scored",
    "train": "train a stage, or fine-tune; the same command resumes an interrupted run",
    "plan": "memory, traffic and speed of a training step on a TPU slice, without a TPU",
    "data": "training data: index, check, statistics, images of packed rows, shards",
    "bench": "speed of this machine, beside transformers where it is installed",
    "convert": "checkpoints: Hugging Face to Orbax and back, initial weights, tables, comparisons",
}

EXIT_BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {printable(message, 500)}; {self.prog} --help lists the flags\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vl3 argv`.

    Returns:
      0 when done, 2 for bad input, 130 when stopped by Ctrl-C, 141 when the reader of stdout left, 1 when stdout cannot
      be written. Other exceptions pass (exit code 1).
    """
    words = sys.argv[1:] if argv is None else argv
    command = f"vl3 {words[0]}" if words and words[0] in COMMANDS else "vl3"
    try:
        with streams.ended_by_interrupt(command):
            streams.prepare()
            try:
                return _run(words, command)
            finally:
                sys.stdout.flush()
    except streams.OutputError as error:
        return streams.output_failed(error)
    finally:
        if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends its threads there is nobody to say a line


def _run(argv: Sequence[str], command: str) -> int:
    try:
        # --config.a.b=1 changes a setting of the configuration, in every command that takes one.
        argv = [re.sub(r"^--config\.", "--set=", word) for word in argv]
        chosen = argv[0] if argv and argv[0] in COMMANDS else None
        if chosen != "plan":  # it uses the compiler of the TPU library
            platforms.leave_out_absent_tpu()
        arguments = _parser(chosen).parse_args(argv)
        module = _module(arguments.command)
        with logs.on_terminal():
            return module.run(arguments) or 0
    except (InputError, RunError) as error:
        streams.say(f"{command}: {error}")
        return exit_code(error)
    except KeyboardInterrupt:
        streams.say(f"{command}: stopped")
        return streams.EXIT_INTERRUPTED


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="vl3", description="VideoLLaMA3 in JAX: ask, convert, train.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            _module(name).add_arguments(subparser)
    return parser


def _module(name: str):
    return importlib.import_module(f"vl3_jax.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
