#!/usr/bin/env python3
"""`vl3 train` as one or several processes of this machine, watched, and started again when one of them fails.

    python launch/local.py --processes 2 --cpu-devices 4 -- --config configs/stage3_2b.py:mock --workdir RUN
    python launch/local.py --processes 8 --gpus 8 --restarts 3 --hang-seconds 900 -- --config ... --workdir ...
    python launch/local.py --hang-seconds 1800 -- --config ... --workdir gs://...      # the part of one host of a pod

What follows `--` are the arguments of `vl3 train`. The job is started again from its last checkpoint when a process
dies, or when no step was finished for too long; not when the input was bad. With one process, coordinates of a larger
job come from the environment, as always.

exit codes: 0 done; 1 failed, and no restarts are left; 2 bad input; 75 stopped by SIGTERM or Ctrl-C before the end:
the same command goes on.
"""

import argparse
import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
METRICS = "metrics.jsonl"
# What `vl3 train` says when a signal ended it, to any of its processes, after a checkpoint (vl3_jax/training/loop.py).
_SAID_STOPPED = re.compile(rb"^stopped after step \d+ of \d+;")
_PROGRESS = re.compile(rb"^(.*?\d+/\d+) \[")  # of a bar, without its clock
_SETTLING = 5.0  # seconds that the others get to end by themselves after one has failed
_POLL = 0.2


@dataclasses.dataclass(frozen=True)
class Process:
    """One process: what it runs, and how its environment differs from ours."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def __str__(self) -> str:
        changes = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*changes, shlex.join(self.command)])


def processes(arguments: argparse.Namespace, port: int | str) -> list[Process]:
    """The processes of one attempt."""
    command = (sys.executable, "-m", "vl3_jax.cli.main", "train", *arguments.train)
    count, found = arguments.processes, []
    for rank in range(count):
        environment = dict(arguments.compiler)
        if arguments.cpu_devices:
            flag = f"--xla_force_host_platform_device_count={arguments.cpu_devices}"
            others = [word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word]
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*others, flag])}
        if arguments.gpus:
            each = arguments.gpus // count
            visible = ",".join(str(number) for number in range(rank * each, (rank + 1) * each))
            environment["CUDA_VISIBLE_DEVICES"] = visible
        several = ("--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id", str(rank))
        found.append(Process(command + (several if count > 1 else ()), environment))
    return found


class Attempt:
    """The processes of a job from their start to their end.

    Args:
      planned: what to start.
      hang_seconds: without a finished step, after which they count as dead; 0 is never.
      beat: something that changes when the job moves, besides what it prints.
      grace: seconds to save what there is after `stop`.
    """

    def __init__(self, planned: Sequence[Process], hang_seconds: float, beat: Callable[[], object], grace: float):
        self._hang_seconds, self._beat, self._grace = hang_seconds, beat, grace
        self._alive = time.monotonic()
        self._killed_at = float("inf")
        self.said_stopped = False
        # A session of their own: Ctrl-C reaches us alone, and we tell them.
        self._running = [
            subprocess.Popen(
                one.command,
                env=os.environ | one.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for one in planned
        ]
        self._readers = [threading.Thread(target=self._read, args=pair) for pair in enumerate(self._running)]
        for reader in self._readers:
            reader.start()

    @property
    def numbers(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._running]

    def stop(self) -> None:
        """Asks all of them to save and end."""
        self._killed_at = min(self._killed_at, time.monotonic() + self._grace)
        self._signal(signal.SIGTERM)

    def wait(self) -> list[int]:
        """Exit codes, when all have ended; negative ones are signals."""
        seen, next_look = self._beat() if self._hang_seconds else None, 0.0
        while any(process.poll() is None for process in self._running):
            time.sleep(_POLL)
            now = time.monotonic()
            if any(process.poll() for process in self._running):
                self._killed_at = min(self._killed_at, now + _SETTLING)
            if self._hang_seconds and now > next_look:
                next_look = now + self._hang_seconds / 10
                found = self._beat()
                if found != seen:
                    seen, self._alive = found, now
            if self._hang_seconds and now - self._alive > self._hang_seconds and self._killed_at == float("inf"):
                say(f"no step was finished for {self._hang_seconds:.0f} s: the job counts as dead")
                self._killed_at = now
            if now >= self._killed_at:
                self._signal(signal.SIGKILL)
        for reader in self._readers:
            reader.join(timeout=5)  # a grandchild may keep the pipe open
        return [process.returncode for process in self._running]

    def _signal(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)

    def _read(self, rank: int, process: subprocess.Popen) -> None:
        """Passes on what a process prints, a line at a time with its rank; bars end their lines with a return."""
        left, last = b"", None
        while block := os.read(process.stdout.fileno(), 1 << 16):
            *lines, left = re.split(rb"[\r\n]+", left + block)
            for line in filter(None, lines):
                self._show(rank, line)
                bar = _PROGRESS.match(line)
                if bar and bar[1] != last:
                    last, self._alive = bar[1], time.monotonic()
        if left:
            self._show(rank, left)

    def _show(self, rank: int, line: bytes) -> None:
        self.said_stopped |= bool(_SAID_STOPPED.match(line))
        sys.stdout.buffer.write(b"[%d] %s\n" % (rank, line))
        sys.stdout.buffer.flush()


def supervise(arguments: argparse.Namespace) -> int:
    """Attempts until the job is done, hopeless, or stopped; the exit code."""
    attempt, asked = None, []

    def note(number: int, _: object) -> None:
        asked.append(number)
        if attempt is not None:
            attempt.stop()

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in range(arguments.restarts + 1):
            if asked:
                return STOPPED
            planned = processes(arguments, arguments.port or free_port())
            attempt = Attempt(planned, arguments.hang_seconds, heartbeat(arguments.workdir), arguments.grace_seconds)
            if asked:  # between the look above and the start
                attempt.stop()
            say(f"attempt {number + 1}: processes {', '.join(map(str, attempt.numbers))}")
            codes = attempt.wait()
            if BAD_INPUT in codes:
                return BAD_INPUT
            if asked or (attempt.said_stopped and not any(codes)):
                say("stopped before the end; the same command goes on")
                return STOPPED
            if not any(codes):
                return DONE
            how = ", ".join(f"process {rank}: {ending(code)}" for rank, code in enumerate(codes))
            again = f"again from the last checkpoint, restart {number + 1} of {arguments.restarts}"
            say(f"{how}; {again if number < arguments.restarts else 'giving up'}")
        return FAILED
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def heartbeat(workdir: str) -> Callable[[], object]:
    """Looks at the reports of the run, which every host sees: something that changes with each."""

    def look() -> object:
        try:
            if "://" not in workdir:
                found = os.stat(os.path.join(workdir, METRICS))
                return found.st_size, found.st_mtime_ns
            from etils import epath

            return len((epath.Path(workdir) / METRICS).read_bytes())
        except Exception:  # none yet, or the bucket cannot be asked now
            return None

    return look


def ending(code: int) -> str:
    """An exit code in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def say(text: str) -> None:
    """A line of ours among those of the processes."""
    print(f"[launch] {text}", flush=True)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; `train` are those after `--`, `workdir` the one among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the job on this machine (1)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--cpu-devices", type=int, default=0, metavar="M", help="devices a process makes of the CPU")
    split.add_argument("--gpus", type=int, default=0, metavar="G", help="GPUs of this machine, shared out evenly")
    parser.add_argument("--restarts", type=int, default=0, metavar="K", help="how often a failed job is started again")
    parser.add_argument(
        "--hang-seconds", type=float, default=0, metavar="S", help="without a step, after which it counts as dead"
    )
    parser.add_argument("--grace-seconds", type=float, default=600, metavar="S", help="to save after SIGTERM (600)")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator; any free one unless given")
    parser.add_argument("--xla-flags", metavar="G", help="compiler flags for v5e, v5p, v6e or gpu (none)")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="of TPUs in the job, for --xla-flags (1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and end")
    parser.add_argument("train", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of `vl3 train`")
    arguments = parser.parse_args(argv)
    arguments.train = [*arguments.train[arguments.train[:1] == ["--"] :]]
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--workdir")
    arguments.workdir = own.parse_known_args(arguments.train)[0].workdir
    if not arguments.workdir:
        parser.error("give the arguments of `vl3 train` after --, with --workdir among them")
    if arguments.processes < 1 or min(arguments.restarts, arguments.cpu_devices, arguments.gpus) < 0:
        parser.error("--processes is at least 1, the other numbers are not negative")
    if arguments.gpus % arguments.processes:
        parser.error(f"{arguments.gpus} GPUs cannot be shared out evenly among {arguments.processes} processes")
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
    """See the module's description."""
    arguments = parsed(argv)
    if arguments.dry_run:
        print("\n".join(map(str, processes(arguments, arguments.port or "PORT"))))
        return DONE
    return supervise(arguments)


if __name__ == "__main__":
    sys.exit(main())
