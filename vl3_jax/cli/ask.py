"""`vl3 ask`: answers one question about images and videos."""

import argparse
import functools
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from vl3_jax.cli import generation_flags
from vl3_jax.errors import InputError, printable
from vl3_jax.json_file import unique_keys
from vl3_jax.processing.messages import Turn, parse_messages
from vl3_jax.processing.output_files import empty_folder

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 ask --model DIR --video cat.mp4 "What does the cat do?"
  vl3 ask --model DIR --image a.jpg --image b.jpg "What differs?"
  vl3 ask --model DIR --video talk.mp4 --start 60 --end 90 --fps 2 --json "When does she point at the screen?"
  vl3 ask --model DIR --conversation messages.json
  vl3 ask --model DIR --image receipt.jpg --json-schema receipt.json "What was bought? Answer in JSON."
  vl3 ask --model DIR --image cat.jpg --choices yes,no "Is there a dog?"

Media stand before the question, in the order of the flags: paths, file:// and data: references, - for stdin, and with
--allow-remote http(s):// addresses. A conversation file holds a list of messages:
  [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1}, {"type": "text", "text": "..."}]}]

exit codes: 0 answered, 2 bad input (one line on stderr names it), 1 a failure of ours or of stdout"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    generation_flags.add_model(parser)
    generation_flags.add_adapter(parser)
    question = parser.add_argument_group("question")
    question.add_argument("question", nargs="?", default="", help="the question")
    # One list for both, so that their order is kept.
    for kind, text in (("image", "an image"), ("video", "a video or folder of frames")):
        part = functools.partial(_media_part, kind)
        question.add_argument(
            f"--{kind}", dest="media", action="append", type=part, metavar="F", help=f"{text}; may be repeated"
        )
    question.add_argument("--system", metavar="TEXT", help="a system prompt")
    question.add_argument("--conversation", metavar="FILE", help="JSON list of messages instead of question and media")
    generation_flags.add_media(parser)
    generation_flags.add_decoding(parser)
    generation_flags.add_constraint(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object: ids, frames, times, masks if any")
    output.add_argument(
        "--save-frames",
        metavar="DIR",
        help="write each image and frame as the model gets it to a new or an empty folder (in ..._kept.png pruned "
        "blocks are dim)",
    )
    output.add_argument("--logprobs", type=int, metavar="K", help="with --json: the K most likely tokens per position")


def run(arguments: argparse.Namespace) -> None:
    """Answers the question and prints the answer."""
    if arguments.logprobs is not None and not arguments.json:
        raise InputError("--logprobs are part of the JSON object; add --json")
    messages = parse_messages(_messages(arguments))
    settings = generation_flags.settings(arguments)
    if arguments.save_frames is not None:
        empty_folder(arguments.save_frames)  # before the model is loaded
    model = generation_flags.load_model(arguments)
    streaming = not arguments.json and sys.stdout.isatty()
    with generation_flags.naming_flags():
        answer = model.answer(messages, on_text=generation_flags.show_text if streaming else None, **settings)
    if streaming:
        print()
    for warning in answer.warnings:
        logger.warning("vl3 ask: warning: %s", warning)
    if arguments.visual_budget is not None:
        logger.info("vl3 ask: %s", pruning(answer))
    saved = {} if arguments.save_frames is None else {"saved_frames": _save_frames(answer, arguments.save_frames)}
    if arguments.json:
        print(json.dumps(answer.as_json() | saved))
        return
    if not streaming:
        print(answer.text)
    if sys.stderr.isatty():
        logger.info("%s", summary(answer))


def _save_frames(answer, folder: str) -> list[str]:
    paths = answer.processed.save_frames(folder)
    if not paths:
        logger.warning("vl3 ask: warning: no image or video in the prompt, so %s stays empty", folder)
    return paths


def pruning(answer) -> str:
    """Returns how many vision tokens of an answer were kept, and by which threshold."""
    processed, threshold = answer.processed, answer.processed.prune_threshold
    kept = f"{processed.visual_tokens:,} of {processed.visual_tokens_before_pruning:,} vision tokens kept"
    return f"{kept}, by a threshold of {threshold:g} ({threshold / 2:g} grey levels)"


def summary(answer) -> str:
    """Returns one line about tokens and time, for a terminal."""
    kept_tokens, before = answer.processed.visual_tokens, answer.processed.visual_tokens_before_pruning
    kept = f", {kept_tokens} of {before} vision tokens kept ({kept_tokens / before:.0%})" if before else ""
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in answer.seconds.items() if value >= 0.05)
    speed = f"{answer.tokens_per_second:.1f} tokens/s"
    return (
        f"[{len(answer.processed.sample.tokens)} prompt tokens{kept}; {len(answer.token_ids)} new at {speed}; {spent}]"
    )


def _media_part(kind: str, path: str) -> dict[str, str]:
    return {"type": kind, kind: generation_flags.file_argument(path)}


def _messages(arguments: argparse.Namespace) -> Sequence[dict[str, Any] | Turn]:
    if arguments.conversation:
        if arguments.question or arguments.media or arguments.system:
            raise InputError("--conversation holds the question, media and system prompt already; leave the others out")
        return read_conversation(generation_flags.file_argument(arguments.conversation))
    parts = arguments.media or []
    if not arguments.question and not parts:
        raise InputError("nothing to answer: give a question, --image, --video or --conversation")
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": arguments.question}]}
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, turn]


def read_conversation(path: str) -> list[dict[str, Any]]:
    """Reads the messages of a JSON file.

    Raises:
      InputError: The file is missing or is no list of messages; names the line.
    """
    name = printable(path)
    try:
        with open(path, "rb") as file:
            messages = json.loads(file.read(), object_pairs_hook=unique_keys)  # bytes: a byte-order mark is understood
    except json.JSONDecodeError as error:
        raise InputError(f"{name}, line {error.lineno}: not JSON ({error.msg}); correct the file") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}; give a JSON file with a list of messages") from None
    except UnicodeDecodeError:
        raise InputError(f"{name}: not UTF-8 text; give a JSON file with a list of messages") from None
    except (ValueError, RecursionError) as error:  # a key given twice, a number of thousands of digits, endless nesting
        raise InputError(f"{name}: cannot be read as JSON ({error}); correct the file") from None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f'{name}: expected a list of messages like {{"role": "user", "content": "..."}}')
    return messages
