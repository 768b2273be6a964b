#!/usr/bin/env python3
"""nano from nothing: five stages one after the other, the held-out questions after each, and the finished model.

    python launch/nano/train.py --runs RUNS
    python launch/nano/train.py --runs RUNS/second --seed 1
    python launch/nano/train.py --runs RUNS --export vl3_jax/nano

below RUNS: nano0 ... nano4 the workdirs, eval0 ... eval4 answers and scores after each stage, blind and unpruned those
of the finished model with the media of other questions and with every video token. What is finished is left as it is,
what was stopped goes on. `report.py` makes tables and figures of it all.

exit codes: 0 done; 1 failed; 2 bad input; 75 stopped by SIGTERM or Ctrl-C before the end: the same command goes on.
"""

import argparse
import json
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

from data_pipelines.synthetic.registry import STREAM, TASKS, VIDEO
from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import find

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
STAGES = range(5)
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


class Commands:
    """Runs `vl3` commands; a signal to us ends the one that runs, which saves what it has."""

    def __init__(self):
        self.stopped = False
        self._running: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, words: Sequence[str]) -> int:
        """The exit code of `vl3 words`."""
        print(f"[launch] vl3 {shlex.join(words)}", flush=True)
        if not self.stopped:
            # A session of its own: Ctrl-C reaches us alone, and we tell it.
            command = [sys.executable, "-m", "vl3_jax.cli.main", *words]
            self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            if self.stopped:  # while it was being started
                self._running.terminate()
            code = self._running.wait()
        return STOPPED if self.stopped else code

    def _stop(self, *_: object) -> None:
        self.stopped = True
        if self._running is not None:
            self._running.terminate()


def plan(arguments: argparse.Namespace) -> list[list[str]]:
    """All commands, in order."""
    runs, found = arguments.runs, []
    seeds = [] if arguments.seed is None else [f"--config.{name}={arguments.seed}" for name in ("seed", "data.seed")]
    export = str(arguments.export or runs / "export")
    asked = ["--count", str(arguments.count)]
    for stage in STAGES:
        workdir = str(runs / f"nano{stage}")
        start = [f"--config.init_from={runs / f'nano{stage - 1}'}"] if stage else []
        config = arguments.configs / f"nano_stage{stage}.py"
        found.append(["train", "--config", str(config), "--workdir", workdir, *start, *seeds])
        model = workdir
        if stage == STAGES[-1]:
            found.append(["convert", "export", workdir, export, "--format", "official"])
            model = export
        found.append(_questions(model, arguments.tasks, runs / f"eval{stage}", *asked))
    chosen = find(arguments.tasks)
    seen = [task.name for task in chosen if task.has_media]
    moving = [name for name in seen if TASKS[name.partition("/")[2]].media in (VIDEO, STREAM)]
    if seen:
        found.append(_questions(export, seen, runs / "blind", *asked, "--blind"))
    if moving:
        found.append(_questions(export, moving, runs / "unpruned", *asked, "--no-prune"))
    return found


def _questions(model: str, tasks: Sequence[str], out: pathlib.Path, *flags: str) -> list[str]:
    return ["eval", "--model", model, "--tasks", ",".join(tasks), "--out", str(out), *flags]


def finished(workdir: pathlib.Path, seed: int | None) -> bool:
    """Whether a stage has its last checkpoint. InputError if it was trained with another seed than the one given."""
    try:
        config = json.loads((workdir / "config.json").read_text())["config"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{workdir}: not the workdir of a stage; give another --runs") from None
    if seed not in (None, config["seed"]):
        raise InputError(f"{workdir}: trained with seed {config['seed']}, now it is {seed}; give another --runs")
    return (workdir / "checkpoints" / str(config["steps"])).is_dir()


def follow(commands: Sequence[Sequence[str]], seed: int | None) -> int:
    """Runs them until one fails, or all are done; the exit code."""
    running = Commands()
    for words in commands:
        workdir = pathlib.Path(words[words.index("--workdir") + 1]) if words[0] == "train" else None
        if workdir and finished(workdir, seed):
            print(f"[launch] {workdir} is finished", flush=True)
            continue
        code = running.run(words)
        if code == DONE and workdir and not finished(workdir, seed):  # someone else stopped it
            code = STOPPED
        if code == STOPPED:
            print("[launch] stopped before the end; the same command goes on", flush=True)
        if code != DONE:
            return code if code in (BAD_INPUT, STOPPED) else FAILED
    return DONE


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=pathlib.Path, metavar="DIR", help="where everything goes")
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, data and their order (the configurations')")
    parser.add_argument("--export", type=pathlib.Path, metavar="DIR", help="of the finished model (RUNS/export)")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="held-out questions of each task (200)")
    parser.add_argument("--tasks", default="nano", type=lambda text: text.split(","), help="as of `vl3 eval` (nano)")
    parser.add_argument("--configs", type=pathlib.Path, default=CONFIGS, metavar="DIR", help="of nano_stage0.py ...")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's description."""
    arguments = parsed(argv)
    try:
        commands = plan(arguments)
        if arguments.dry_run:
            print("\n".join(f"vl3 {shlex.join(words)}" for words in commands))
            return DONE
        return follow(commands, arguments.seed)
    except InputError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
