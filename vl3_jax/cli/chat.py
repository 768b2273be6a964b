"""`vl3 chat`: a conversation about images and videos, in the terminal."""

import argparse
import logging
import os
import shlex
import sys
from typing import Any

from vl3_jax.cli import generation_flags, streams
from vl3_jax.errors import InputError, printable
from vl3_jax.inference import answer_settings
from vl3_jax.processing.images import open_image
from vl3_jax.processing.media_source import MediaBytes, path_or_bytes, scheme_of
from vl3_jax.processing.remote_media import RemotePolicy, fetched
from vl3_jax.processing.videos import open_video

logger = logging.getLogger(__name__)

HELP = """/image FILE   attach an image to the next question; FILE may be quoted or begin with ~
/video FILE   attach a video to the next question
/clear        clear the conversation
/help         list the commands
/quit         leave (or end of input)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"in the conversation:\n{HELP}"
    generation_flags.add_model(parser)
    generation_flags.add_adapter(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads questions from stdin until its end.

    A turn that fails or is stopped leaves the history and the attached media as they were, without those that cannot be
    read. Ctrl-C at the prompt, or without a terminal, leaves the conversation.
    """
    settings = generation_flags.settings(arguments)
    session = ChatSession(generation_flags.load_model(arguments), arguments.system, settings)
    if sys.stdin.isatty():
        print(f"{HELP}\n")
    with streams.raising_interrupts():
        _converse(session)


def _converse(session: "ChatSession") -> None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            session.handle(line)
        except InputError as error:
            logger.error("vl3 chat: %s", error)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
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

    def _attach(self, kind: str, argument: str) -> None:
        if not argument:
            raise InputError(f"/{kind} needs a file")
        policy = RemotePolicy() if self._settings.get(answer_settings.ALLOW_REMOTE) else None
        source = fetched(_named_file(argument), policy)
        data, name = path_or_bytes(source, kind, f"{kind} file", "a file")
        # A later question reads it once more, which a pipe does not allow and another machine need not be asked for.
        source = MediaBytes(data, name) if isinstance(data, bytes) else source
        open_image(source).load() if kind == "image" else open_video(source)
        self._media.append({"type": kind, kind: source})
        print(f"({name} is attached to the next question)")

    def _ask(self, question: str) -> None:
        turn = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        messages = [*self._system, *self._history, turn]
        try:
            with generation_flags.naming_flags():
                output = self._model.answer(messages, on_text=generation_flags.show_text, **self._settings)
        except InputError:
            self._media = [part for part in self._media if self._is_readable(part)]
            raise
        print()
        for warning in output.warnings:
            logger.warning("vl3 chat: warning: %s", warning)
        self._history += [turn, {"role": "assistant", "content": output.text}]
        self._media = []

    def _is_readable(self, part: dict[str, Any]) -> bool:
        """Returns whether a medium alone can be read; otherwise says that it is left out, or no turn could succeed."""
        try:
            self._model.process([{"role": "user", "content": [part]}], **self._settings)
        except InputError:
            source = part[part["type"]]
            print(f"({printable(source.name if isinstance(source, MediaBytes) else source)} is no longer attached)")
            return False
        return True


def _named_file(argument: str) -> str:
    """Returns the file that a line names: as it is, or quoted or escaped as a terminal pastes it."""
    if scheme_of(argument) or os.path.exists(argument):
        return argument
    try:
        words = shlex.split(argument)
    except ValueError:  # a quotation mark that belongs to the name
        words = []
    return generation_flags.file_argument(words[0] if len(words) == 1 else argument)
