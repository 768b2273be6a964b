"""`vl3 data`: index, check, stats, show, write."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from data_pipelines import mixtures
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, missing_files, open_mixture, require_present
from data_pipelines.record_counts import RecordCounts
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import SampleErrorLog, to_json_lines
from vl3_jax import config_file, config_tree
from vl3_jax.cli import settings_flags
from vl3_jax.cli.train import CONFIG
from vl3_jax.config_tree import AMOUNT, COUNT, Limits
from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 data check --annotations train.jsonl --media media/
  vl3 data index --config stage4:2b --config.data.root=/data --tokenizer CHECKPOINT --workers 16
  vl3 data stats --config data/stage4 --config.root=/data --tokenizer CHECKPOINT --suggest-budgets
  vl3 data show  --annotations train.jsonl --media media/ --tokenizer CHECKPOINT --row 3 --out row.png
  vl3 data write --annotations train.jsonl --media media/ --out shards/

Give index, stats, show and training the same configuration (file and changes): an index belongs to its configuration.
exit codes: 0 done, 1 bad samples (check) or an internal error, 2 bad input"""
_SIZE_TOLERANCE = 0.1  # a larger relative difference from the expected number of samples is reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands and their flags."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    index = _command(commands, "index", "stores the lengths of all samples; resumes where it was stopped")
    index.add_argument(
        "--kept", action="store_true", help="decode videos to count the vision tokens that pruning keeps"
    )
    check = _command(
        commands,
        "check",
        "reads all annotations and media, tells what they hold, and lists the samples that training would skip",
        False,
    )
    check.add_argument("--quick", action="store_true", help="read headers only, without decoding")
    check.add_argument("--report", metavar="FILE", help="write every problem to FILE, one JSON object per line")
    check.add_argument("--json", action="store_true", help="print one JSON object: what was read, and every problem")
    stats = _command(commands, "stats", "prints lengths, tokens kept by pruning and packing efficiency")
    stats.add_argument("--suggest-budgets", action="store_true", help="also pack with other patch budgets")
    stats.add_argument(
        "--measure",
        type=settings_flags.number(int, AMOUNT),
        default=0,
        metavar="N",
        help="read N rows to measure samples/s and tokens/s",
    )
    stats.add_argument("--json", action="store_true", help="print one JSON object")
    show = _command(
        commands,
        "show",
        "renders a packed row: frames with pruned patches greyed, samples in colours, supervised tokens marked",
    )
    show.add_argument("--row", type=settings_flags.number(int, AMOUNT), default=0, help="row number in the first epoch")
    show.add_argument("--out", default="row.png", metavar="FILE", help="image file to write")
    write = _command(commands, "write", "writes annotations and media into ArrayRecord shards", False)
    write.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    write.add_argument(
        "--samples-per-shard",
        type=settings_flags.number(int, COUNT),
        default=4096,
        metavar="N",
        help="fewer for long videos",
    )


def run(arguments: argparse.Namespace) -> int | None:
    from vl3_jax.checkpoint import open_tokenizer

    with contextlib.ExitStack() as stack:
        if "tokenizer" in arguments:
            arguments.tokenizer = stack.enter_context(open_tokenizer(arguments.tokenizer))
        return _RUN[arguments.data_command](arguments)


def _command(commands, name: str, summary: str, needs_tokenizer: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--config", metavar=CONFIG, help="configuration of a mixture (data/stage4) or a training run (stage4:2b)"
    )
    data.add_argument(
        "--annotations", nargs="+", metavar="FILE", help="annotation files or shards, instead of --config"
    )
    data.add_argument("--media", default="", metavar="DIR", help="folder or URL of the media (with --annotations)")
    data.add_argument(
        "--allow-outside", action="store_true", help="read media outside that folder, too: absolute paths, .., file://"
    )
    data.add_argument("--allow-remote", action="store_true", help="fetch media that are named by http(s):// addresses")
    settings_flags.add_changes(data)
    data.add_argument("--skip-missing", action="store_true", help="leave out data sets that are not on disk")
    data.add_argument(
        "--workers",
        type=settings_flags.number(int, Limits(0, 1024)),
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of worker processes (0: none)",
    )
    if needs_tokenizer:
        data.add_argument(
            "--tokenizer", required=True, metavar="M", help="a tokenizer.json, or whatever `--model` takes"
        )
    return parser


def _config(arguments: argparse.Namespace) -> mixtures.MixtureConfig:
    if bool(arguments.config) == bool(arguments.annotations):
        raise InputError("give either --config or --annotations")
    if arguments.config:
        return mixtures.load(arguments.config, arguments.set)
    spec = DatasetSpec("data", tuple(arguments.annotations), arguments.media)
    config = config_tree.to_config_dict(mixtures.MixtureConfig(root="", datasets={spec.name: spec}))
    return config_tree.from_tree(mixtures.MixtureConfig, config_file.changed(config, arguments.set))


def _specs(arguments: argparse.Namespace, config: mixtures.MixtureConfig) -> list[DatasetSpec]:
    outside, remote = arguments.allow_outside, arguments.allow_remote
    specs = [
        dataclasses.replace(spec, outside=spec.outside or outside, remote=spec.remote or remote)
        for spec in mixtures.dataset_specs(config)
    ]
    missing = missing_files(specs)
    if not arguments.skip_missing:
        require_present(specs)
    for name, path in missing.items():
        logger.warning("left out: %s (%s is missing)", name, path)
    present = [spec for spec in specs if spec.name not in missing]
    if not present:
        raise InputError("all data sets are missing; set `root` to the folder that holds them")
    return present


def _mixture(arguments: argparse.Namespace) -> MixtureDataset:
    config = _config(arguments)
    return open_mixture(_specs(arguments, config), SampleBuilder(arguments.tokenizer, mixtures.data_settings(config)))


def _index(arguments: argparse.Namespace) -> None:
    from data_pipelines.index import build_index

    config = _config(arguments)
    sample_builder = SampleBuilder(arguments.tokenizer, mixtures.data_settings(config))
    log, counts = SampleErrorLog(), RecordCounts()
    for spec in _specs(arguments, config):
        source, media = spec.open(), spec.media_resolver
        with _bar(spec.name) as progress:
            index = build_index(
                source, media, sample_builder, spec.index_folder, arguments.kept, arguments.workers, progress
            )
        log.add(index.errors(), len(index))
        counts.add([index.counts()])
        print(f"{spec.name}: {len(index):,} samples, {int((~index.good).sum()):,} bad, {index.folder}")
        if spec.size and abs(len(index) - spec.size) > _SIZE_TOLERANCE * spec.size:
            logger.warning("%s: about %s samples were expected; is this the whole file?", spec.name, f"{spec.size:,}")
    print(*counts.lines(), sep="\n")
    if log.bad:
        logger.warning("%s", log.table())


def _check(arguments: argparse.Namespace) -> int:
    from data_pipelines.inspection.checking import check

    config = _config(arguments)
    processor = mixtures.data_settings(config).processor
    log, counts, problems = SampleErrorLog(), RecordCounts(), []
    for spec in _specs(arguments, config):
        with _bar(spec.name) as progress:
            seen, read, errors = check(spec, processor, not arguments.quick, arguments.workers, progress)
        log.add(errors, seen)
        counts.add([read])
        problems += errors
    if arguments.report:
        try:
            pathlib.Path(arguments.report).write_text(to_json_lines(problems), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{arguments.report}: {error.strerror}; choose a file that can be written") from None
    if arguments.json:
        listed = [dataclasses.asdict(problem) for problem in problems]
        print(json.dumps({**counts.to_json(), "samples": log.seen, "bad": log.bad, "problems": listed}))
    else:
        print(*counts.lines(), log.table(), sep="\n")
    return 1 if log.bad else 0


def _stats(arguments: argparse.Namespace) -> None:
    from data_pipelines.inspection.statistics import collect_stats, format_stats

    stats = collect_stats(_mixture(arguments), arguments.suggest_budgets, arguments.measure, arguments.workers)
    print(json.dumps(stats) if arguments.json else format_stats(stats))


def _show(arguments: argparse.Namespace) -> None:
    from data_pipelines.inspection.row_image import render_row
    from data_pipelines.loader import BatchBuilder

    mixture = _mixture(arguments)
    step_plan = mixture.step_plan(1)
    if not 0 <= arguments.row < len(step_plan):
        raise InputError(f"row {arguments.row}: the plan has rows 0 to {len(step_plan) - 1}")
    arrays = BatchBuilder(mixture, step_plan, [0])(arguments.row)
    render_row(arrays).save(arguments.out)
    segment_ids, weights = arrays["segment_ids"][0], arrays["loss_weight"][0]
    is_vision = arrays["vision_slot"][0] >= 0
    for segment, number in enumerate(step_plan[arguments.row].rows[0].tolist(), start=1):
        in_segment = segment_ids == segment
        supervised = arrays["targets"][0][in_segment & (weights > 0)]
        answer = " ".join(mixture.sample_builder.tokenizer.decode(supervised.tolist()).split())
        dataset, local = mixture.locate(number)
        tokens, vision_tokens = int(in_segment.sum()), int(is_vision[in_segment].sum())
        print(f"{segment:3} {dataset.spec.name} #{local + 1}: {tokens} tokens, {vision_tokens} of them vision")
        print(f"    {len(supervised)} supervised: {answer[:100]}")
    print(f"{int((segment_ids > 0).sum())} of {len(segment_ids)} tokens used; image written to {arguments.out}")
    for line in arrays["_errors"].tobytes().decode().splitlines():
        logger.warning("%s", line)


def _write(arguments: argparse.Namespace) -> None:
    from data_pipelines.shard_writer import write

    log = SampleErrorLog()
    for spec in _specs(arguments, _config(arguments)):
        with _bar(spec.name) as progress:
            shards, seen, errors = write(spec, arguments.out, arguments.samples_per_shard, arguments.workers, progress)
        log.add(errors, seen)
        size = sum(shard.stat().st_size for shard in shards)
        print(f"{spec.name}: {len(shards)} shards, {size / 1e6:.1f} MB in {arguments.out}")
    if log.bad:
        logger.warning("%s", log.table())


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr; yields its callback (done, total)."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(desc=title, unit=" samples", file=sys.stderr, mininterval=interval) as bar:

        def update(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.n = bar.initial = done  # work of an earlier run does not count towards the rate
            bar.update(done - bar.n)

        yield update


_RUN = {"index": _index, "check": _check, "stats": _stats, "show": _show, "write": _write}
