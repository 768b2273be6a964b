"""The flags that `ask` and `chat` share: which model, how to look at media, how to decode."""

import argparse
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--model and how to load it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=required,
        metavar="M",
        help="nano (the package's own), an Orbax folder, a training workdir, a Hugging Face folder (read in place), "
        "a Hub id owner/name@rev",
    )
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of weights and activations (default: float32 on a CPU)"
    )
    group.add_argument("--quantize", choices=["int8"], help="weights in int8: half of bfloat16's memory")
    group.add_argument("--token", metavar="TOKEN", help="for a private Hub repository")


def add_media(parser: argparse.ArgumentParser) -> None:
    """How pictures and videos are turned into vision tokens."""
    group = parser.add_argument_group("looking at media")
    group.add_argument("--fps", type=float, help="frames looked at per second of video (default: 1)")
    group.add_argument("--max-frames", type=int, help="of a video; more are thinned out evenly (default: 180)")
    group.add_argument("--start", type=float, metavar="S", help="look at a video from this second on")
    group.add_argument("--end", type=float, metavar="S", help="look at a video up to this second")
    group.add_argument(
        "--preprocess",
        choices=["official", "native"],
        help="frame sampling and resize rule: of the original release (default) or of its transformers port",
    )
    group.add_argument("--max-visual-tokens", type=int, metavar="N", help="budget before pruning (default: 16384)")
    group.add_argument("--image-merge", type=int, choices=[1, 2], help="patches merged each way in a picture")
    pruning = group.add_mutually_exclusive_group()
    pruning.add_argument(
        "--prune-threshold", type=float, metavar="X", help="prune video tokens that changed less (default: 0.1)"
    )
    pruning.add_argument("--no-prune", action="store_true", help="keep every video token")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """How the answer is decoded."""
    group = parser.add_argument_group("decoding (greedy unless a temperature is given)")
    group.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="(default: 1024)")
    group.add_argument("--temperature", type=float, metavar="T")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="over generated tokens (default: the checkpoint's; 1 turns it off)",
    )


MEDIA = ("fps", "max_frames", "start", "end", "preprocess", "max_visual_tokens", "image_merge", "prune_threshold")
DECODING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty")


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags ask of `ChatModel.answer`; flags not given are left out."""
    chosen = {name: getattr(arguments, name) for name in (*MEDIA, *DECODING)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if arguments.no_prune:
        chosen["prune"] = False
    return chosen


def load_model(arguments: argparse.Namespace):
    """Loads --model, telling a terminal what is going on: loading, decoding frames, compiling."""
    from vl3_jax.inference.chat_model import load

    if not sys.stderr.isatty():
        return load(arguments.model, dtype=arguments.dtype, quantize=arguments.quantize, token=arguments.token)
    assistant = load(
        arguments.model,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        token=arguments.token,
        quiet=False,
        on_status=logger.info,
    )
    assistant.processor.on_frame = show_frames
    return assistant


def show_frames(name: str, done: int, total: int) -> None:
    """A counter that stays on its line until the last frame is decoded."""
    print(f"\r{name}: frame {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
