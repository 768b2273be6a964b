"""`vl3 chat`: a conversation about pictures and videos, in the terminal."""

import argparse
import sys
from typing import Any

from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError
from vl3_jax.processing.images import open_image
from vl3_jax.processing.videos import open_video

HELP = """/image FILE   show a picture with the next question
/video FILE   show a video with the next question
/clear        forget the conversation
/help         this list
/quit         leave (or end of input)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = f"in the conversation:\n{HELP}"
    generation_flags.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reads questions from stdin until its end; a failed turn is reported and leaves the history as it was."""
    settings = generation_flags.settings(arguments)
    conversation = ChatSession(generation_flags.load_model(arguments), arguments.system, settings)
    if sys.stdin.isatty():
        print(f"{HELP}\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/quit":
            return
        try:
            conversation.take(line.strip())
        except InputError as error:
            generation_flags.say(f"vl3 chat: {error}")
        except KeyboardInterrupt:
            print("\n(stopped; the turn is forgotten)")


class ChatSession:
    """The history of one chat and the media waiting for the next question."""

    def __init__(self, assistant, system: str | None, settings: dict[str, Any]):
        self._assistant = assistant
        self._start = [{"role": "system", "content": system}] if system else []
        self._settings = settings
        self._history: list[dict[str, Any]] = []
        self._media: list[dict[str, Any]] = []

    def take(self, line: str) -> None:
        """Acts on one line: a command or a question, whose answer is printed as it comes."""
        command, _, argument = line.partition(" ")
        if command in ("/image", "/video"):
            self._add_medium(command[1:], argument.strip())
        elif line == "/clear":
            self._history, self._media = [], []
            print("(forgotten)")
        elif line == "/help":
            print(HELP)
        elif command.startswith("/"):
            raise InputError(f"unknown command {command}; /help lists them")
        elif line:
            self._ask(line)

    def _add_medium(self, kind: str, path: str) -> None:
        if not path:
            raise InputError(f"/{kind} needs a file")
        open_image(path) if kind == "image" else open_video(path)
        self._media.append({"type": kind, kind: path})
        print(f"({path} goes with the next question)")

    def _ask(self, question: str) -> None:
        turn = {"role": "user", "content": [*self._media, {"type": "text", "text": question}]}
        messages = [*self._start, *self._history, turn]
        answer = self._assistant.answer(messages, on_text=_write, **self._settings)
        print()
        for note in answer.processed.notes:
            generation_flags.say(f"vl3 chat: note: {note}")
        self._history += [turn, {"role": "assistant", "content": answer.text}]
        self._media = []


def _write(piece: str) -> None:
    print(piece, end="", flush=True)
