#!/usr/bin/env python3
"""Runs `vl3 train` as one or several processes on this machine, supervises them, and restarts them after a failure.

    python launch/local.py --processes 2 --cpu-devices 4 -- --config stage3:2b,mock --workdir RUN
    python launch/local.py --processes 8 --gpus 8 --restarts 3 --hang-seconds 900 -- --config ... --workdir ...
    python launch/local.py --hang-seconds 1800 -- --config ... --workdir gs://...      # on each host of a pod

The arguments after `--` are passed to `vl3 train`. The job is restarted from its last checkpoint when a process dies or
when no step was finished for too long, but not after bad input. With one process, the coordinates of a larger job are
read from the environment by JAX.

exit codes: 0 done; 1 failed, and no restarts are left; 2 bad input; 75 stopped by SIGTERM, SIGHUP or Ctrl-C before the
end: run the same command to resume.
"""

import argparse
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
METRICS = "metrics.jsonl"
# The log line of `vl3 train` (vl3_jax/training/loop.py) after a signal to any of its processes and a checkpoint.
_STOPPED_LINE = re.compile(rb"^stopped after step \d+ of \d+;")
_PROGRESS = re.compile(rb"^(.*?\d+/\d+) \[")  # a progress bar without its elapsed time
_FAILURE_GRACE = 5.0  # seconds that the other processes get to exit after one has failed
_POLL_SECONDS = 0.2


def process_commands(arguments: argparse.Namespace, port: int | str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yields the command of each process of an attempt, by rank, and the variables that its environment adds to ours.

    Args:
      arguments: Those of the command line.
      port: Port of the coordinator.
    """
    count = arguments.processes
    for rank in range(count):
        command = [sys.executable, "-m", "vl3_jax.cli.main", "train", *arguments.train]
        environment = dict(arguments.compiler)
        if arguments.cpu_devices:
            flag = f"--xla_force_host_platform_device_count={arguments.cpu_devices}"
            other_flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word]
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*other_flags, flag])}
        if arguments.gpus:
            per_process = arguments.gpus // count
            visible = map(str, range(rank * per_process, (rank + 1) * per_process))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        if count > 1:
            command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id", str(rank)]
        yield command, environment


class Attempt:
    """The processes of a job from their start to their end.

    Attributes:
      processes: The processes, by rank.
      logged_stop: Whether a process has said that it was stopped before the end of the training.

    Args:
      arguments: Those of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self._workdir = arguments.workdir
        self._hang_seconds, self._grace_seconds = arguments.hang_seconds, arguments.grace_seconds
        self._last_progress = time.monotonic()
        self._kill_at = float("inf")
        self.logged_stop = False
        # With sessions of their own they do not receive Ctrl-C directly; `stop` sends them a signal.
        self.processes = [
            subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for command, environment in process_commands(arguments, arguments.port or free_port())
        ]
        self._readers = [threading.Thread(target=self._read, args=pair) for pair in enumerate(self.processes)]
        for reader in self._readers:
            reader.start()

    def stop(self) -> None:
        """Asks all processes to save a checkpoint and exit."""
        self._kill_at = min(self._kill_at, time.monotonic() + self._grace_seconds)
        self._signal(signal.SIGTERM)

    def wait(self) -> list[int]:
        """Waits for all processes and returns their exit codes; negative ones are signals."""
        last_beat, next_check = heartbeat(self._workdir) if self._hang_seconds else None, 0.0
        while any(process.poll() is None for process in self.processes):
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if any(process.poll() for process in self.processes):
                self._kill_at = min(self._kill_at, now + _FAILURE_GRACE)
            if self._hang_seconds and now > next_check:
                next_check = now + self._hang_seconds / 10
                beat = heartbeat(self._workdir)
                if beat != last_beat:
                    last_beat, self._last_progress = beat, now
            hanging = self._hang_seconds and now - self._last_progress > self._hang_seconds
            if hanging and self._kill_at == float("inf"):
                log(f"no step was finished for {self._hang_seconds:.0f} s: the job hangs and is killed")
                self._kill_at = now
            if now >= self._kill_at:
                self._signal(signal.SIGKILL)
        for reader in self._readers:
            reader.join(timeout=5)  # a grandchild may keep the pipe open
        return [process.returncode for process in self.processes]

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def _read(self, rank: int, process: subprocess.Popen) -> None:
        """Prints the output of a process, each line with its rank; progress bars end lines with a carriage return."""
        rest, last_bar = b"", None
        while block := os.read(process.stdout.fileno(), 1 << 16):
            *lines, rest = re.split(rb"[\r\n]+", rest + block)
            for line in filter(None, lines):
                self._print(rank, line)
                bar = _PROGRESS.match(line)
                if bar and bar[1] != last_bar:
                    last_bar, self._last_progress = bar[1], time.monotonic()
        if rest:
            self._print(rank, rest)

    def _print(self, rank: int, line: bytes) -> None:
        self.logged_stop |= bool(_STOPPED_LINE.match(line))
        sys.stdout.buffer.write(b"[%d] %s\n" % (rank, line))
        sys.stdout.buffer.flush()


def supervise(arguments: argparse.Namespace) -> int:
    """Runs attempts until the job is done, fails for good or is stopped; returns the exit code."""
    attempt, signals = None, []

    def handle(number: int, _: object) -> None:
        signals.append(number)
        if attempt is not None:
            attempt.stop()

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
            signal.signal(number, handle)
    for index in range(arguments.restarts + 1):
        if signals:
            return STOPPED
        attempt = Attempt(arguments)
        if signals:  # received between the check above and the assignment
            attempt.stop()
        log(f"attempt {index + 1}: processes {', '.join(str(process.pid) for process in attempt.processes)}")
        codes = attempt.wait()
        if BAD_INPUT in codes:
            return BAD_INPUT
        if signals or (attempt.logged_stop and not any(codes)):
            log("stopped before the end; run the same command to resume")
            return STOPPED
        if not any(codes):
            return DONE
        exits = [f"killed by signal {-code}" if code < 0 else f"exit code {code}" for code in codes]
        causes = ", ".join(f"process {rank}: {cause}" for rank, cause in enumerate(exits))
        restart = f"again from the last checkpoint, restart {index + 1} of {arguments.restarts}"
        log(f"{causes}; {restart if index < arguments.restarts else 'no restarts left'}")
    return FAILED


def heartbeat(workdir: str) -> int | None:
    """Returns a value that changes with each entry in the metrics file of the run, which every host sees."""
    try:
        from etils import epath

        return len((epath.Path(workdir) / METRICS).read_bytes())
    except Exception:  # no metrics yet, or the bucket is unavailable
        return None


def free_port() -> int:
    """Returns a free TCP port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def log(text: str) -> None:
    """Prints a line of the launcher among those of the processes."""
    print(f"[launch] {text}", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the arguments; `train` holds those after `--`, `workdir` is taken from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="processes on this machine (1)")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument("--cpu-devices", type=int, default=0, metavar="M", help="CPU devices of each process")
    devices.add_argument("--gpus", type=int, default=0, metavar="G", help="GPUs of this machine, divided evenly")
    add("--restarts", type=int, default=0, metavar="K", help="restarts of a failed job (0)")
    add(
        "--hang-seconds",
        type=float,
        default=0,
        metavar="S",
        help="restart the job after S seconds without a finished step (0: never)",
    )
    add("--grace-seconds", type=float, default=600, metavar="S", help="time to save a checkpoint after SIGTERM (600)")
    add("--port", type=int, default=0, help="port of the coordinator (default: any free port)")
    add("--xla-flags", metavar="G", help="set compiler flags for v5e, v5p, v6e or gpu (none)")
    add("--slices", type=int, default=1, metavar="N", help="TPU slices of the job, for --xla-flags (1)")
    add("--dry-run", action="store_true", help="print the commands without running them")
    add("train", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="arguments of `vl3 train`")
    arguments = parser.parse_args(argv)
    arguments.train = [*arguments.train[arguments.train[:1] == ["--"] :]]
    train_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    train_parser.add_argument("--workdir")
    arguments.workdir = train_parser.parse_known_args(arguments.train)[0].workdir
    if not arguments.workdir:
        parser.error("give the arguments of `vl3 train` after --, with --workdir among them")
    if arguments.processes < 1 or min(arguments.restarts, arguments.cpu_devices, arguments.gpus) < 0:
        parser.error("--processes must be at least 1, the other numbers must not be negative")
    if arguments.gpus % arguments.processes:
        parser.error(f"{arguments.gpus} GPUs cannot be divided evenly among {arguments.processes} processes")
    arguments.compiler = {}
    if arguments.xla_flags:
        from vl3_jax.errors import InputError
        from vl3_jax.parallel.xla_flags import environment

        try:
            arguments.compiler = environment(arguments.xla_flags, arguments.slices)
        except InputError as error:
            parser.error(f"--xla-flags: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or prints the job; returns the exit code."""
    arguments = parse_arguments(argv)
    if arguments.dry_run:
        for command, environment in process_commands(arguments, arguments.port or "PORT"):
            variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
            print(*variables, shlex.join(command))
        return DONE
    return supervise(arguments)


if __name__ == "__main__":
    sys.exit(main())
