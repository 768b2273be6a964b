"""`vl3 data`: index, check, stats, show, write."""

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from data_pipelines import mixtures
from data_pipelines.mixture_dataset import DatasetSpec, MixtureDataset, missing_files, open_mixture, require_present
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import SampleErrorLog, to_json
from vl3_jax import config_file
from vl3_jax.errors import InputError

EPILOG = """examples:
  vl3 data check --annotations train.jsonl --media media/
  vl3 data index --config configs/stage4_2b.py --config.data.root=/data --tokenizer CHECKPOINT --workers 16
  vl3 data stats --config configs/data/stage4.py --config.root=/data --tokenizer CHECKPOINT --suggest-budgets
  vl3 data show  --annotations train.jsonl --media media/ --tokenizer CHECKPOINT --row 3 --out row.png
  vl3 data write --annotations train.jsonl --media media/ --out shards/

The same configuration (file and changes) must be given to index, stats, show and training: an index belongs to it.
exit codes: 0 done, 1 problems found (check) or a failure of ours, 2 bad input"""
_UNLIKE = 0.1  # a data set whose size differs by more from what was expected is worth a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    index = _command(commands, "index", "records lengths of all samples, once; goes on where it was stopped")
    index.add_argument("--kept", action="store_true", help="decode videos to count the tokens that pruning leaves")
    check = _command(commands, "check", "reads all annotations and media and lists what training would skip", False)
    check.add_argument("--quick", action="store_true", help="read headers only, decode nothing")
    check.add_argument("--report", metavar="FILE", help="write every problem there, one JSON object a line")
    stats = _command(commands, "stats", "lengths, kept tokens, how full rows get")
    stats.add_argument("--suggest-budgets", action="store_true", help="plan with other patch budgets, too")
    stats.add_argument("--measure", type=int, default=0, metavar="N", help="read N rows: samples/s, tokens/s")
    stats.add_argument("--json", action="store_true", help="print one JSON object")
    show = _command(
        commands, "show", "draws a packed row: frames, pruned patches dim, samples coloured, targets marked"
    )
    show.add_argument("--row", type=int, default=0, help="of the first epoch's plan")
    show.add_argument("--out", default="row.png", metavar="FILE")
    write = _command(commands, "write", "writes annotations and media into ArrayRecord shards", False)
    write.add_argument("--out", required=True, metavar="DIR")
    write.add_argument("--samples-per-shard", type=int, default=4096, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen subcommand."""
    return _RUN[arguments.data_command](arguments)


def _command(commands, name: str, summary: str, needs_tokenizer: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    data = parser.add_argument_group("data")
    data.add_argument("--config", metavar="FILE", help="of a run, or of a mixture (configs/data/stage4.py)")
    data.add_argument("--annotations", nargs="+", metavar="FILE", help="instead: annotation files or shards")
    data.add_argument("--media", default="", metavar="DIR", help="folder or URL of the media (with --annotations)")
    data.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE")
    data.add_argument("--skip-missing", action="store_true", help="leave out data sets that are not on disk")
    data.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (0: none)")
    if needs_tokenizer:
        data.add_argument("--tokenizer", required=True, metavar="DIR", help="a checkpoint folder or tokenizer.json")
    return parser


def _config(arguments: argparse.Namespace):
    if bool(arguments.config) == bool(arguments.annotations):
        raise InputError("give either --config or --annotations")
    if arguments.config:
        config = config_file.load(arguments.config, arguments.set)
        return config.data if "data" in config else config  # of a training run, or a mixture alone
    config = mixtures.mixture([mixtures.Group("", 0, ["data"])], root="")
    config.datasets.data.annotations = tuple(arguments.annotations)
    config.datasets.data.media = arguments.media
    return config_file.changed(config, arguments.set)


def _entries(arguments: argparse.Namespace, config) -> list[DatasetSpec]:
    specs = mixtures.dataset_specs(config)
    absent = missing_files(specs)
    if not arguments.skip_missing:
        require_present(specs)
    for name, path in absent.items():
        _say(f"left out: {name} ({path} is not there)")
    present = [spec for spec in specs if spec.name not in absent]
    if not present:
        raise InputError("none of the data sets is there; set `root` to the folder they are in")
    return present


def _corpus(arguments: argparse.Namespace) -> MixtureDataset:
    config = _config(arguments)
    examples = SampleBuilder(arguments.tokenizer, mixtures.data_settings(config))
    return open_mixture(_entries(arguments, config), examples)


def _index(arguments: argparse.Namespace) -> int:
    from data_pipelines.indexing import build_index
    from data_pipelines.media_resolver import MediaResolver

    config = _config(arguments)
    examples = SampleBuilder(arguments.tokenizer, mixtures.data_settings(config))
    log = SampleErrorLog()
    for spec in _entries(arguments, config):
        source, media = spec.open(), MediaResolver(spec.media)
        with _bar(spec.name) as progress:
            index = build_index(source, media, examples, spec.index_folder, arguments.kept, arguments.workers, progress)
        log.add(index.problems(), len(index))
        print(f"{spec.name}: {len(index):,} samples, {int((~index.good).sum()):,} bad, {index.folder}")
        if spec.size and abs(len(index) - spec.size) > _UNLIKE * spec.size:
            _say(f"{spec.name}: about {spec.size:,} samples were expected; is this the whole file?")
    if log.bad:
        _say(log.table())
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from data_pipelines.checking import check

    log = SampleErrorLog()
    lines = []
    for spec in _entries(arguments, _config(arguments)):
        with _bar(spec.name) as progress:
            seen, problems = check(spec, not arguments.quick, arguments.workers, progress)
        log.add(problems, seen)
        lines += [to_json(problem) + "\n" for problem in problems]
    if arguments.report:
        pathlib.Path(arguments.report).write_text("".join(lines), encoding="utf-8")
    print(log.table())
    return 1 if log.bad else 0


def _stats(arguments: argparse.Namespace) -> int:
    from data_pipelines import tables

    found = tables.collect(_corpus(arguments), arguments.suggest_budgets, arguments.measure, arguments.workers)
    print(json.dumps(found) if arguments.json else tables.rendered(found))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from data_pipelines.loader import BatchBuilder
    from data_pipelines.row_image import render_row
    from data_pipelines.step_plan import StepPlan

    mixture = _corpus(arguments)
    schedule = StepPlan(mixture, 1)
    if not 0 <= arguments.row < len(schedule):
        raise InputError(f"row {arguments.row}: the plan has rows 0 to {len(schedule) - 1}")
    element = BatchBuilder(mixture, schedule, slice(0, 1))(arguments.row)
    render_row(element).save(arguments.out)
    segments, weights = element["segment_ids"][0], element["loss_weight"][0]
    vision = element["vision_slot"][0] >= 0
    for segment, number in enumerate(schedule[arguments.row].rows[0].tolist(), start=1):
        here = segments == segment
        learned = element["targets"][0][here & (weights > 0)]
        answer = " ".join(mixture.examples.tokenizer.decode(learned.tolist()).split())
        dataset, local = mixture.locate(number)
        of_vision = int(vision[here].sum())
        print(f"{segment:3} {dataset.spec.name} #{local + 1}: {int(here.sum())} tokens, {of_vision} of vision")
        print(f"    learns {len(learned)}: {answer[:100]}")
    print(f"{int((segments > 0).sum())} of {len(segments)} tokens used; drawn to {arguments.out}")
    for line in element["_problems"].tobytes().decode().splitlines():
        _say(line)
    return 0


def _write(arguments: argparse.Namespace) -> int:
    from data_pipelines.shard_writer import write

    log = SampleErrorLog()
    for spec in _entries(arguments, _config(arguments)):
        with _bar(spec.name) as progress:
            shards, seen, problems = write(
                spec, arguments.out, arguments.samples_per_shard, arguments.workers, progress
            )
        log.add(problems, seen)
        size = sum(shard.stat().st_size for shard in shards)
        print(f"{spec.name}: {len(shards)} shards, {size / 1e6:.1f} MB in {arguments.out}")
    if log.bad:
        _say(log.table())
    return 0


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a callback (done, total)."""
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(desc=title, unit=" samples", file=sys.stderr, mininterval=interval) as bar:

        def update(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.n = bar.initial = done  # what an earlier run did takes no time in this one
            bar.update(done - bar.n)

        yield update


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_RUN = {"index": _index, "check": _check, "stats": _stats, "show": _show, "write": _write}
