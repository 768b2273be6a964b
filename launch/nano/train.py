#!/usr/bin/env python3
"""Trains nano from scratch: five stages, an evaluation after each, and the export of the final model.

    python launch/nano/train.py --runs RUNS
    python launch/nano/train.py --runs RUNS/second --seed 1
    python launch/nano/train.py --runs RUNS --export vl3_jax/nano

RUNS gets the workdirs nano0 ... nano4, and answers and scores: eval0 ... eval4 after each stage, blind and unpruned of
the final model with the media of other questions and with every video token. Finished stages are skipped, interrupted
ones are resumed. `report.py` makes tables and figures from RUNS.

exit codes: 0 done; 1 failed; 2 bad input; 75 stopped by SIGTERM, SIGHUP or Ctrl-C before the end: the same
command resumes.
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
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
STAGES = range(5)
CONFIG = "nano"  # its variants 0 to 4 are the stages


class Commands:
    """Runs `vl3` commands. On SIGTERM, SIGHUP or Ctrl-C the running one gets SIGTERM, on which it saves its state."""

    def __init__(self):
        self.stopped = False
        self._running: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                signal.signal(number, self._stop)

    def run(self, arguments: Sequence[str]) -> int:
        """Runs `vl3` with these arguments and returns its exit code."""
        print(f"[launch] vl3 {shlex.join(arguments)}", flush=True)
        if not self.stopped:
            # In its own session, so that Ctrl-C reaches this process only, which then sends SIGTERM.
            command = [sys.executable, "-m", "vl3_jax.cli.main", *arguments]
            self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            if self.stopped:  # by a signal that came while the command was being started
                self._running.terminate()
            code = self._running.wait()
        return STOPPED if self.stopped else code

    def _stop(self, *_: object) -> None:
        self.stopped = True
        if self._running is not None:
            self._running.terminate()


def plan(arguments: argparse.Namespace) -> list[list[str]]:
    """Returns the arguments of all `vl3` commands, in order."""
    runs, commands = arguments.runs, []
    seeds = [] if arguments.seed is None else [f"--config.{name}={arguments.seed}" for name in ("seed", "data.seed")]
    export = str(arguments.export or runs / "export")
    count = ["--count", str(arguments.count)]
    for stage in STAGES:
        workdir = str(runs / f"nano{stage}")
        init = [f"--config.init_from={runs / f'nano{stage - 1}'}"] if stage else []
        commands.append(["train", "--config", f"{arguments.config}:{stage}", "--workdir", workdir, *init, *seeds])
        model = workdir
        if stage == STAGES[-1]:
            commands.append(["convert", "export", workdir, export, "--format", "official"])
            model = export
        commands.append(_eval_command(model, arguments.tasks, runs / f"eval{stage}", *count))
    with_media = [task.name for task in find(arguments.tasks) if task.has_media]
    videos = [name for name in with_media if TASKS[name.partition("/")[2]].media in (VIDEO, STREAM)]
    if with_media:
        commands.append(_eval_command(export, with_media, runs / "blind", *count, "--blind"))
    if videos:
        commands.append(_eval_command(export, videos, runs / "unpruned", *count, "--no-prune"))
    return commands


def _eval_command(model: str, tasks: Sequence[str], out: pathlib.Path, *flags: str) -> list[str]:
    return ["eval", "--model", model, "--tasks", ",".join(tasks), "--out", str(out), *flags]


def is_finished(workdir: pathlib.Path, seed: int | None) -> bool:
    """Returns whether a stage has its last checkpoint.

    Args:
      workdir: Workdir of the stage.
      seed: The seed that the stage must have been trained with; None for any.

    Raises:
      InputError: The folder is not a workdir, or was trained with another seed.
    """
    try:
        config = json.loads((workdir / "config.json").read_text())["config"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, OSError):
        raise InputError(f"{workdir}: not the workdir of a stage; give another --runs") from None
    if seed not in (None, config["seed"]):
        raise InputError(f"{workdir}: trained with seed {config['seed']}, now it is {seed}; give another --runs")
    return (workdir / "checkpoints" / str(config["steps"])).is_dir()


def run_all(commands: Sequence[Sequence[str]], seed: int | None) -> int:
    """Runs the commands in order until one fails; returns the exit code."""
    runner = Commands()
    for command in commands:
        workdir = pathlib.Path(command[command.index("--workdir") + 1]) if command[0] == "train" else None
        if workdir and is_finished(workdir, seed):
            print(f"[launch] {workdir} is finished", flush=True)
            continue
        code = runner.run(command)
        if code == DONE and workdir and not is_finished(workdir, seed):  # the training was stopped from outside
            code = STOPPED
        if code == STOPPED:
            print("[launch] stopped before the end; the same command resumes", flush=True)
        if code != DONE:
            return code if code in (BAD_INPUT, STOPPED) else FAILED
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Trains nano and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", required=True, type=pathlib.Path, metavar="DIR", help="output folder")
    add("--seed", type=int, metavar="N", help="seed of weights and data (default: from the configuration)")
    add("--export", type=pathlib.Path, metavar="DIR", help="folder for the final model (default: RUNS/export)")
    count = QuestionSelection.count
    add("--count", type=int, default=count, metavar="N", help="held-out questions per task (default: %(default)s)")
    add("--tasks", default="nano", type=lambda text: text.split(","), help="as for `vl3 eval` (default: nano)")
    add("--config", default=CONFIG, metavar="NAME|FILE", help="its variants 0 to 4 are the stages (default: nano)")
    add("--dry-run", action="store_true", help="print the commands and exit")
    arguments = parser.parse_args(argv)
    try:
        commands = plan(arguments)
        if arguments.dry_run:
            print("\n".join(f"vl3 {shlex.join(command)}" for command in commands))
            return DONE
        return run_all(commands, arguments.seed)
    except InputError as error:
        print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
