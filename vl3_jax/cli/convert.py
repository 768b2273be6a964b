"""`vl3 convert`: checkpoints in and out of Hugging Face layouts."""

import argparse

from vl3_jax.cli import settings_flags
from vl3_jax.config_tree import SEED, Limits
from vl3_jax.errors import InputError

_DTYPES = ("bfloat16", "float16", "float32")
_ADAPTERS = "peft"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions of `vl3 convert`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    action = actions.add_parser("hf", help="Hugging Face folder or Hub id -> Orbax folder")
    action.add_argument("source", metavar="SRC", help="folder, gs:// folder or owner/name[@revision]")
    action.add_argument("target", metavar="DST", help="Orbax folder to write, local or gs://; the same command resumes")
    action.add_argument("--dtype", choices=_DTYPES, help="stored type (default: as in SRC)")
    action.add_argument("--base", help="base model of an adapter or a projector alone (default: what its files name)")
    action.add_argument("--token", help="Hub token (default: HF_TOKEN or `hf auth login`)")

    action = actions.add_parser("export", help="Orbax folder or training workdir -> Hugging Face folder")
    action.add_argument(
        "source", metavar="SRC", help="Orbax folder, training workdir or Hugging Face folder, local or gs://"
    )
    action.add_argument("target", metavar="DST", help="folder to write; the same command resumes")
    action.add_argument(
        "--format",
        choices=("native", "official", _ADAPTERS),
        required=True,
        help="native: transformers; official: the released code (SAM-2: Meta's); peft: the adapters of a LoRA run",
    )
    action.add_argument("--dtype", choices=_DTYPES, help="stored type (default: as in SRC)")
    action.add_argument("--base", help="peft: folder or Hub id of the base (default: what the run began from)")
    action.add_argument(
        "--layout",
        choices=("native", "official", "official-train"),
        help="peft: layout of the base, where --base is a Hub id",
    )

    action = actions.add_parser(
        "init",
        help="SigLIP + Qwen2.5 -> the Orbax folder that stage 1 is initialised from; VideoLLaMA3 + SAM-2 -> Sa2VA",
    )
    action.add_argument("--vision", metavar="DIR", help="SigLIP, its tower, SigLIP-NaViT; folder or id")
    action.add_argument("--llm", metavar="DIR", help="Qwen2.5; folder or Hub id")
    action.add_argument("--base", metavar="DIR", help="VideoLLaMA3 that is to draw masks; any checkpoint")
    action.add_argument("--sam2", metavar="DIR", help="SAM-2, which --base is joined with; any checkpoint")
    action.add_argument("target", metavar="DST", help="Orbax folder to write, local or gs://; the same command resumes")
    action.add_argument(
        "--seed",
        type=settings_flags.number(int, SEED),
        default=0,
        help="seed of the random projector, or of the layers before SAM-2 (default: %(default)s)",
    )
    action.add_argument("--dtype", choices=_DTYPES, help="stored type (default: as in the inputs)")
    action.add_argument("--token", help="Hub token (default: HF_TOKEN or `hf auth login`)")

    action = actions.add_parser("inspect", help="leaves, shapes, dtypes, sizes and totals of a checkpoint")
    action.add_argument("source", metavar="DIR", help="any checkpoint, read in place")

    action = actions.add_parser("verify", help="compare two checkpoints: names, shapes, values, logits; check digests")
    action.add_argument("a", metavar="A", help="any checkpoint")
    action.add_argument("b", metavar="B", nargs="?", help="any checkpoint; may be left out with --digests")
    action.add_argument(
        "--digests", action="store_true", help="check that the files of Orbax folders are as they were written"
    )
    action.add_argument(
        "--tolerance",
        type=settings_flags.number(float, Limits(0)),
        default=0.0,
        help="largest difference that passes (default: %(default)s)",
    )
    action.add_argument("--no-logits", action="store_true", help="do not run the models")


def run(arguments: argparse.Namespace) -> int | None:
    """Runs one action. Returns 1 when `verify` finds a difference."""
    actions = {"hf": _hf, "export": _export, "init": _init, "inspect": _inspect, "verify": _verify}
    return actions[arguments.action](arguments)


def _hf(arguments: argparse.Namespace) -> None:
    from vl3_jax.checkpoint import open_hf, write_orbax

    source = open_hf(arguments.source, base=arguments.base, token=arguments.token)
    write_orbax(source, arguments.target, _dtype(arguments))


def _export(arguments: argparse.Namespace) -> None:
    if arguments.format == _ADAPTERS:
        from vl3_jax.training.adapter_export import export_adapters

        return export_adapters(arguments.source, arguments.target, arguments.layout, arguments.base, _dtype(arguments))
    if arguments.layout or arguments.base:
        raise InputError("--layout and --base belong to --format peft; leave them out")
    from vl3_jax.checkpoint import open_source, write_hf

    return write_hf(open_source(arguments.source), arguments.target, arguments.format, _dtype(arguments))


def _init(arguments: argparse.Namespace) -> None:
    from vl3_jax.checkpoint import InitSource, Sa2vaInitSource, write_orbax

    parts, joined = (arguments.vision, arguments.llm), (arguments.base, arguments.sam2)
    if (all(parts), any(joined)) != (True, False) and (any(parts), all(joined)) != (False, True):
        raise InputError("give --vision and --llm for a VideoLLaMA3, or --base and --sam2 for a Sa2VA; give one pair")
    kind, models = (InitSource, parts) if all(parts) else (Sa2vaInitSource, joined)
    source = kind(*models, arguments.seed, arguments.token)
    write_orbax(source, arguments.target, _dtype(arguments))


def _inspect(arguments: argparse.Namespace) -> None:
    from vl3_jax.checkpoint import checkpoint_overview, open_source

    print(checkpoint_overview(open_source(arguments.source)))


def _verify(arguments: argparse.Namespace) -> int:
    from vl3_jax.checkpoint import open_source

    if arguments.b is None and not arguments.digests:
        raise InputError("give two checkpoints to compare, or --digests to check one")
    sources = [open_source(name) for name in (arguments.a, arguments.b) if name is not None]
    agreements = [_digests_agree(source) for source in sources if arguments.digests]
    intact = all(agreements)
    if arguments.b is None:
        return 0 if intact else 1
    from vl3_jax.checkpoint import compare

    comparison = compare(*sources, arguments.tolerance, logits=not arguments.no_logits)
    print("\n".join(comparison.lines))
    return 0 if intact and comparison.equal else 1


def _digests_agree(source) -> bool:
    """Checks the digests of a checkpoint and prints what it finds."""
    from vl3_jax.checkpoint.digests import differing

    damaged = differing(source)
    for name in damaged:
        print(f"{source.location}: {name} is not what was written")
    print(f"{source.location}: {'DAMAGED; convert it again' if damaged else 'as it was written'}")
    return not damaged


def _dtype(arguments: argparse.Namespace):
    """Returns the type to store; None stands for that of the source."""
    from vl3_jax.checkpoint.tensors import FLOATS

    return FLOATS.get(arguments.dtype)
