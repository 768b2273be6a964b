"""A supervisor that disturbs a job of two processes at seeded moments and starts it again each time."""

import dataclasses
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from runs import free_port, start

SETTINGS = (
    "mesh.fsdp=2",
    "batch.rows=2",
    "checkpoint.every=2",
    "checkpoint.keep=4",
    "checkpoint.digests=True",
    "log.every=1",
    "data.length=256",
    "data.patches=128",
    "data.vision_tokens=64",
    "data.max_frame_patches=64",
    "data.max_tokens=32",
)
PATIENCE = 600  # seconds for whatever must happen
GRACE = 3  # seconds that the other process has to end by itself before it is killed
STOPS = {"term": signal.SIGTERM, "hup": signal.SIGHUP}
KINDS = ("kill", "term", "hup", "freeze", "fill", "damage")
DAMAGES = ("empty", "cut", "flip", "metadata", "item", "all")


class Files(Protocol):
    """The files below a workdir, by names relative to it."""

    def names(self, folder: str) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class LocalFiles:
    """Files of a local workdir."""

    def __init__(self, root: os.PathLike):
        self.root = pathlib.Path(root)

    def names(self, folder: str) -> list[str]:
        return sorted(p.relative_to(self.root).as_posix() for p in (self.root / folder).rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self.root / name).write_bytes(content)

    def remove(self, name: str) -> None:
        (self.root / name).unlink()


class BucketFiles:
    """Objects of a workdir in a bucket of `FakeGcs`."""

    def __init__(self, server, bucket: str, prefix: str):
        self._server, self._bucket, self._prefix = server, bucket, f"{prefix}/"

    def names(self, folder: str) -> list[str]:
        found = self._server.names(self._bucket, f"{self._prefix}{folder}/")
        return [name.removeprefix(self._prefix) for name in found]

    def read(self, name: str) -> bytes:
        return self._server.buckets[self._bucket][self._prefix + name].data

    def write(self, name: str, content: bytes) -> None:
        self._server.put(self._bucket, self._prefix + name, content)

    def remove(self, name: str) -> None:
        del self._server.buckets[self._bucket][self._prefix + name]


@dataclasses.dataclass(frozen=True)
class Moment:
    """When and how a job is disturbed.

    Attributes:
      kind: One of `KINDS`.
      victim: Number of the process it begins with.
      steps: New steps that the job logs before; 0 counts from its start.
      delay: Seconds after that.
      damage: One of `DAMAGES`.
    """

    kind: str
    victim: int
    steps: int
    delay: float
    damage: str


def moments(seed: int, count: int, kinds: tuple[str, ...] = KINDS) -> list[Moment]:
    """Returns moments of all kinds in turn; every fourth while the job starts, the others at most 4 steps later."""
    rng = random.Random(seed)
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(chosen)
    found = []
    for i, kind in enumerate(chosen):
        starting = i % 4 == 3
        delay = rng.uniform(0, 12) if starting else rng.uniform(0, 0.5)
        steps = 0 if starting else rng.randint(1, 4)
        found.append(Moment(kind, rng.randrange(2), steps, delay, rng.choice(DAMAGES)))
    return found


class Supervisor:
    """Starts a job of two processes again and again, and disturbs it.

    Args:
      workdir: Workdir of the job, local or gs://.
      files: Its files.
      logs: Folder for what the processes say.
      changes: Changes of the configuration besides `SETTINGS`.
    """

    def __init__(self, workdir: os.PathLike | str, files: Files, logs: pathlib.Path, *changes: str):
        self.workdir, self.files, self._logs, self._changes = workdir, files, logs, changes
        self._starts, self._started = 0, []
        logs.mkdir()

    def start(self) -> list[subprocess.Popen]:
        """Starts both processes."""
        port, self._starts = free_port(), self._starts + 1
        address = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id"]
        processes = []
        for rank in ("0", "1"):
            options = {"flags": [*address, rank], "stderr": subprocess.PIPE}
            process = start("stage3:2b", self.workdir, *SETTINGS, *self._changes, **options)
            # Through a pipe, so that what a process says does not need the space that it lacks.
            log = self._logs / f"{self._starts}-{rank}"
            threading.Thread(target=_copy, args=(process.stderr, log), daemon=True).start()
            processes.append(process)
        self._started += processes
        return processes

    def kill(self) -> None:
        """Ends whatever still runs of what it has started."""
        for process in self._started:
            process.kill()
            process.wait()

    def run(self) -> None:
        """Starts the job and lets it end."""
        processes = self.start()
        codes = [process.wait(PATIENCE) for process in processes]
        assert codes == [0, 0], self.said()

    def disturb(self, moment: Moment) -> None:
        """Starts the job, disturbs it at a moment, and waits until both processes are gone."""
        processes, first = self.start(), self.last_step()
        victim, other = processes[moment.victim], processes[1 - moment.victim]
        try:
            self.wait_for(lambda: self.last_step() >= first + moment.steps, processes)
            time.sleep(moment.delay)
            if moment.kind in STOPS:
                victim.send_signal(STOPS[moment.kind])
            elif moment.kind == "fill":
                for process in processes:
                    _fill_disk(process.pid)
                    _ended(process, 2 * GRACE)
            elif moment.kind == "freeze":
                victim.send_signal(signal.SIGSTOP)
                time.sleep(1)
            if moment.kind not in STOPS:
                victim.kill()
            elif moment.steps:
                assert [process.wait(PATIENCE) for process in processes] == [0, 0], self.said()
            _ended(victim, 2 * GRACE)
            _ended(other, GRACE)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if moment.kind == "damage":
            self.damage(moment.damage)

    def wait_for(self, condition: Callable[[], bool], processes: list[subprocess.Popen]) -> None:
        """Waits for something that happens while the processes run."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in processes), self.said()
            time.sleep(0.02)

    def damage(self, kind: str) -> None:
        """Damages the newest checkpoint, if there is an older one."""
        steps = self.steps()
        if len(steps) < 2:
            return
        names = self.files.names(f"checkpoints/{steps[-1]}")
        largest = max(names, key=lambda name: len(self.files.read(name)))
        chosen = {
            "item": [name for name in names if "/training/" in name],
            "metadata": [name for name in names if name.endswith("_METADATA")],
            "cut": [largest],
            "flip": [largest],
        }.get(kind, names)
        for name in chosen:
            content = self.files.read(name)
            middle = len(content) // 2
            if kind in ("item", "all"):
                self.files.remove(name)
            elif kind == "flip":
                self.files.write(name, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            else:
                self.files.write(name, b"" if kind == "empty" else content[:middle])

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, ascending."""
        parts = [name.split("/")[1] for name in self.files.names("checkpoints")]
        return sorted({int(part) for part in parts if part.isdigit()})

    def log(self) -> list[dict]:
        """Returns the whole lines of metrics.jsonl."""
        text = self.files.read("metrics.jsonl").decode()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self) -> int:
        """Returns the step of the last whole line of metrics.jsonl; 0 where there is none."""
        try:
            lines = self.log()
        except (OSError, KeyError):
            return 0
        return lines[-1]["step"] if lines else 0

    def said(self, count: int = 25) -> str:
        """Returns the last lines that the processes of the last start said, without their progress."""
        texts = [(self._logs / f"{self._starts}-{rank}").read_text(errors="replace") for rank in (0, 1)]
        lines = [line.rsplit("\r", 1)[-1] for text in texts for line in text.splitlines()]
        return f"start {self._starts}:\n" + "\n".join(lines[-count:])


def _fill_disk(pid: int) -> None:
    """Lets every file that a process writes end after 512 bytes, as on a full disk."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (512, hard))
    except ProcessLookupError:
        pass


def _copy(stream: BinaryIO, path: pathlib.Path) -> None:
    with stream, path.open("wb", buffering=0) as file:
        for part in iter(lambda: os.read(stream.fileno(), 65_536), b""):
            file.write(part)


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    """Returns whether a process ends within some seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
