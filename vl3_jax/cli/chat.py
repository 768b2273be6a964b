"""`vl3 chat`: a conversation about images and videos, in the terminal."""

import argparse
import logging
import sys
from typing import Any

from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError
from vl3_jax.processing.images import open_image
from vl3_jax.processing.videos import open_video

logger = logging.getLogger(__name__)

HELP = """/image FILE   attach an image to the next question
/video FILE   attach a video to the next question
/clear        clear the conversation
/help         list the commands
/quit         leave (or end of input)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"in the conversation:\n{HELP}"
    generation_flags.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads questions from stdin until its end; a turn that fails is reported and leaves the history unchanged."""
    settings = generation_flags.settings(arguments)
    session = ChatSession(generation_flags.load_model(arguments), arguments.system, settings)
    if sys.stdin.isatty():
        print(f"{HELP}\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                return
            session.handle(line)
        except EOFError:
            return
        except InputError as error:
            logger.error("vl3 chat: %s", error)
        except KeyboardInterrupt:
            print("\n(stopped; the turn is discarded)")


class ChatSession:
    """The history of a conversation and the media attached to its next question.

    Args:
      model: The `ChatModel` that answers.
      system: A system prompt, or None.
      settings: Keyword settings of `ChatModel.answer`.
    """

    def __init__(self, model, system: str | None, settings: dict[str, Any]):
        self._model = model
        self._system = [{"role": "system", "content": system}] if system else []
        self._settings = settings
        self._history: list[dict[str, Any]] = []
        self._media: list[dict[str, Any]] = []

    def handle(self, line: str) -> None:
        """Executes a command, or answers a question and prints the answer as it is generated.

        Raises:
          InputError: An unknown command, media that cannot be read, or a question that cannot be answered.
        """
        command, _, argument = line.partition(" ")
        if command in ("/image", "/video"):
            self._attach(command[1:], argument.strip())
        elif line == "/clear":
            self._history, self._media = [], []
            print("(cleared)")
        elif line == "/help":
            print(HELP)
        elif command.startswith("/"):
            raise InputError(f"unknown command {command}; /help lists them")
        elif line:
            self._ask(line)

    def _attach(self, kind: str, path: str) -> None:
        if not path:
            raise InputError(f"/{kind} needs a file")
        open_image(path) if kind == "image" else open_video(path)
        self._media.append({"type": kind, kind: path})
        print(f"({path} is attached to the next question)")

    def _ask(self, question: str) -> None:
        turn = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        messages = [*self._system, *self._history, turn]
        output = self._model.answer(messages, on_text=generation_flags.show_text, **self._settings)
        print()
        for warning in output.processed.warnings:
            logger.warning("vl3 chat: warning: %s", warning)
        self._history += [turn, {"role": "assistant", "content": output.text}]
        self._media = []
