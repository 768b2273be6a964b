"""The flags that several commands share: the model, the processing of media, decoding."""

import argparse
import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vl3_jax.cli import settings_flags
from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.inference import answer_settings
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.json_file import read_json
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.video_reader import FrameSamplingOptions
from vl3_jax.sa2va.vision_budget import KEY_FRAMES, MOST_TOKENS

logger = logging.getLogger(__name__)


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --model and the flags of its loading."""
    group = parser.add_argument_group("model")
    kinds = (
        "nano (the package's own), an Orbax folder, a training workdir, a Hugging Face folder (read in place), "
        "a Hub id owner/name@rev"
    )
    add_checkpoint(group, kinds, "float32 on a CPU", required)
    group.add_argument("--quantize", choices=["int8"], help="weights in int8: half of bfloat16's memory")
    group.add_argument(
        "--kv-cache", choices=["int8"], help="keys and values in int8: about half of bfloat16's memory for long prompts"
    )


def add_checkpoint(group: Any, kinds: str, dtype: str, required: bool = True) -> None:
    """Adds --model, --dtype and --token, which any model has.

    Args:
      group: Parser or argument group.
      kinds: What --model may be.
      dtype: The default of --dtype, in words.
      required: Whether --model must be given.
    """
    group.add_argument("--model", required=required, metavar="M", help=kinds)
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help=f"type of weights and activations (default: {dtype})"
    )
    group.add_argument("--token", metavar="TOKEN", help="token of a private Hub repository")


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter."""
    parser.add_argument(
        "--adapter",
        type=_adapter,
        metavar="NAME=DIR",
        help="answer with the LoRA adapter of a PEFT folder or Hub id, which stays apart from the weights",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter for several adapters, of which each request chooses one."""
    parser.add_argument(
        "--adapter",
        dest="adapters",
        action="append",
        default=[],
        type=_adapter,
        metavar="NAME=DIR",
        help="a LoRA adapter that requests may choose by its name, from a PEFT folder or Hub id; may be repeated",
    )


def _adapter(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: give a name and a folder, such as mine=RUNS/adapter")
    return name, os.path.expanduser(folder)


def add_media(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the processing of images and videos."""
    group = parser.add_argument_group("media")
    settings_flags.add(group, FrameSamplingOptions, _flags(answer_settings.VIDEO))
    add_processing(group)
    group.add_argument(
        "--allow-remote", action="store_true", help="fetch media from http(s):// addresses, which is refused otherwise"
    )


def add_processing(group: Any, image_merge: str = "the checkpoint's") -> None:
    """Adds the flags of the processor; `image_merge` is what the help names as the default of that setting."""
    processor = _flags(answer_settings.PROCESSOR)
    threshold = {"prune_threshold": processor.pop("prune_threshold")}
    settings_flags.add(group, ProcessorConfig, processor, {"image_merge": image_merge})
    pruning = group.add_mutually_exclusive_group()
    settings_flags.add(pruning, ProcessorConfig, threshold)
    pruning.add_argument("--no-prune", action="store_true", help="keep every video token")


def add_visual_limit(group: Any) -> None:
    """Adds --max-visual-tokens alone, for answers with masks."""
    keyword, field = "max_visual_tokens", answer_settings.PROCESSOR["max_visual_tokens"]
    settings_flags.add(group, ProcessorConfig, _flags({keyword: field}), {field: str(MOST_TOKENS)})


def add_tracking(group: Any) -> None:
    """Adds the flags of how objects are tracked that an answer names; those that are not given are None."""
    group.add_argument(
        "--key-frames",
        type=settings_flags.number(int, Limits(1, 1024)),
        metavar="N",
        help=f"frames of a video in which objects are drawn that the language model sees (default: {KEY_FRAMES})",
    )
    group.add_argument(
        "--mode",
        choices=("sa2va", "sa2va_i"),
        help="sa2va: the first frames are seen and tracked from; sa2va_i: evenly spaced ones (default: sa2va)",
    )


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of decoding."""
    group = parser.add_argument_group("decoding (greedy unless a temperature is given)")
    # The first is one of `vl3 ask` alone, the second of Python alone.
    add_sampling(group, [name for name in answer_settings.SAMPLING if name not in ("logprobs", "stop")])


def add_sampling(group: Any, keywords: Iterable[str], defaults: Mapping[str, str] | None = None) -> None:
    """Adds the flags of some settings of decoding; `defaults` are what the help names instead of the declared ones."""
    flags = _flags({name: answer_settings.SAMPLING[name] for name in keywords})
    own = {"repetition_penalty": "the checkpoint's; 1 turns it off"}
    settings_flags.add(group, SamplingConfig, flags, {**own, **(defaults or {})})


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what the answer must match."""
    group = parser.add_argument_group("form of the answer (at most one)").add_mutually_exclusive_group()
    group.add_argument("--json-schema", metavar="FILE", help="a JSON value that the schema in a file allows")
    group.add_argument("--regex", metavar="R", help="a text that matches a regular expression as a whole")
    group.add_argument("--choices", metavar="A,B", help="one of several texts, separated by commas")


def _constraint(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords of a constraint that were given as flags."""
    given = {name: getattr(arguments, name, None) for name in answer_settings.CONSTRAINT}
    if given["json_schema"] is not None:
        given["json_schema"] = read_json(pathlib.Path(file_argument(given["json_schema"])), unique=True)
    if given["choices"] is not None:
        given["choices"] = tuple(text.strip() for text in given["choices"].split(","))
    return {name: value for name, value in given.items() if value is not None}


def _flags(keywords: dict[str, str]) -> dict[str, str]:
    return {field: f"--{keyword.replace('_', '-')}" for keyword, field in keywords.items()}


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the keywords of `ChatModel.answer` that were given as flags.

    Raises:
      SettingError: A value that its setting cannot have, under the name of the flag.
    """
    keywords = (*answer_settings.SAMPLING, *answer_settings.PROCESSOR, *answer_settings.VIDEO)
    found = given(arguments, keywords) | _constraint(arguments)
    found |= {answer_settings.ALLOW_REMOTE: True} if arguments.allow_remote else {}
    with naming_flags():  # now rather than after the model is loaded
        answer_settings.resolve(found, SamplingConfig(), ProcessorConfig())
    return found


def given(arguments: argparse.Namespace, keywords: Iterable[str]) -> dict[str, Any]:
    """Returns those of some keywords that were given as flags, with --no-prune and --adapter."""
    found = {name: value for name in keywords if (value := getattr(arguments, name, None)) is not None}
    found |= {answer_settings.PRUNE: False} if arguments.no_prune else {}
    adapter = getattr(arguments, "adapter", None)
    return found | ({answer_settings.ADAPTER: adapter[0]} if adapter else {})


def adapters(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the folders of the adapters that were given, by name.

    Raises:
      InputError: Two have the same name.
    """
    one = getattr(arguments, "adapter", None)
    several = [one] if one else getattr(arguments, "adapters", [])
    folders = dict(several)
    if len(folders) < len(several):
        raise InputError(f"--adapter gives {several[-1][0]} twice; give each adapter a name of its own")
    return folders


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Names a setting as its flag in errors of `ChatModel.answer`."""
    try:
        yield
    except SettingError as error:
        name, *place = error.name.split(" ", 1)
        raise error.renamed(" ".join([f"--{name.replace('_', '-')}", *place])) from None


def file_argument(name: str) -> str:
    """Returns the path that a flag or a line means: `-` is stdin, `~` the home folder, where no shell replaced it."""
    return "/dev/stdin" if name == "-" else os.path.expanduser(name)


def model_identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what tells a loaded model from another one: its checkpoint, its numerics, its adapters.

    Raises:
      InputError: There is no such checkpoint or adapter.
    """
    from vl3_jax.checkpoint import open_source
    from vl3_jax.checkpoint.hf_source import open_adapter
    from vl3_jax.storage.paths import file_fingerprints

    found: dict[str, Any] = {name: getattr(arguments, name) for name in ("dtype", "quantize", "kv_cache")}
    found["checkpoint"] = open_source(arguments.model, token=arguments.token).fingerprint()
    folders = adapters(arguments)
    if folders:
        found["adapter_files"] = {
            name: file_fingerprints(open_adapter(folder, arguments.token).files) for name, folder in folders.items()
        }
    return found


def load_model(arguments: argparse.Namespace):
    """Loads --model; on a terminal it shows progress of loading, decoding frames and compiling."""
    from vl3_jax.inference.open_model import load

    on_terminal = sys.stderr.isatty()
    progress = {"quiet": False, "on_status": logger.info} if on_terminal else {}
    model = load(
        arguments.model,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        kv_cache=arguments.kv_cache,
        adapters=adapters(arguments),
        token=arguments.token,
        **progress,
    )
    if on_terminal:
        model.processor.on_frame = show_frames
    return model


def show_frames(name: str, done: int, total: int) -> None:
    """Shows a counter that stays on its line until the last frame is decoded."""
    print(f"\r{name}: frame {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def show_text(piece: str) -> None:
    """Shows a piece of an answer behind the pieces before it."""
    print(piece, end="", flush=True)
