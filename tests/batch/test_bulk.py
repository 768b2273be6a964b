"""`vl3 batch` at length: killed many times and finished by others, memory, and speed beside the engine alone."""

import functools
import json
import pathlib
import random
import subprocess
import sys
import time

import pytest

import vl3_jax as vl3
from support.batch_files import TASKS, check_complete, read_records, texts, write_requests
from vl3_jax.batch.answering import BatchAnswerer
from vl3_jax.batch.request_file import RequestFile
from vl3_jax.inference.chat_completion import parse_body
from vl3_jax.inference.requests import Request
from vl3_jax.storage.shards import Shard

ROWS = 8
_PATIENCE = 3600  # seconds


def started(written, out, *flags):
    """Starts the command in a process of its own."""
    command = [sys.executable, "-m", "vl3_jax", "batch", "--model", "nano", "--batch", str(ROWS)]
    command += ["--in", str(written.path), "--out", str(out), *flags]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ended(process) -> str:
    _, errors = process.communicate(timeout=_PATIENCE)
    assert process.returncode == 0, errors
    return errors


def lines_in(folder: pathlib.Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("answers*.jsonl"))


def resident_mib(process) -> float:
    """Returns the memory of a process that belongs to no file."""
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0  # it has ended


def memory_over_time(process, out, count) -> tuple[float, float]:
    """Waits for the end of a run; returns its memory when 40 % and when 95 % of the answers were there, in MiB."""
    found = []
    for share in (0.4, 0.95):
        deadline = time.monotonic() + _PATIENCE
        while lines_in(out.parent) < share * count and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        found.append(resident_mib(process))
    return found[0], found[1]


def killed_and_finished(folder: pathlib.Path, count: int, kills: int) -> None:
    """Compares a run that is killed at random, each time with another number of shards, with an uninterrupted one."""
    written = write_requests(folder / "requests", count)
    whole, out = folder / "whole" / "answers.jsonl", folder / "killed" / "answers.jsonl"
    process = started(written, whole)
    first, last = memory_over_time(process, whole, count)
    ended(process)
    print(f"memory: {first:.0f} MiB after 40 % of {count} answers, {last:.0f} MiB after 95 %")
    assert last <= 1.1 * first + 30
    expected = read_records(whole)
    check_complete(expected, written)

    chance = random.Random(11)
    for number in range(kills):
        shards = chance.choice([1, 2, 3])
        before = lines_in(out.parent)
        processes = [started(written, out, "--shard", f"{part}/{shards}") for part in range(1, shards + 1)]
        wanted = before + chance.randint(1, max(count // (kills + 1), 1))
        deadline = time.monotonic() + _PATIENCE
        while lines_in(out.parent) < wanted and any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.random() * 0.2)
        for process in processes:
            process.kill()
            process.communicate()
        print(f"kill {number + 1}: {lines_in(out.parent)} of {count} answers, {shards} processes")
        assert lines_in(out.parent) >= before
    processes = [started(written, out, "--shard", f"{part}/2") for part in (1, 2)]
    for process in processes:
        ended(process)
    records = read_records(out)
    check_complete(records, written)
    assert texts(records) == texts(expected)
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]


@pytest.mark.slow
def test_two_thousand_requests_killed_ten_times(tmp_path):
    killed_and_finished(tmp_path, count=2000, kills=10)


def speeds(folder: pathlib.Path, count: int, tasks, runs: int = 3) -> tuple[float, float, float, float]:
    """Returns requests per second of preparing alone, of the engine alone, of all (best runs), and the share waited."""
    model, requests = vl3.load("nano"), RequestFile(write_requests(folder, count, 0.0, tasks).path)
    reads = [functools.partial(requests.read, index) for index in requests.lines_of(Shard())]
    asked, start = [], time.perf_counter()
    for read in reads:
        body = parse_body(json.loads(read().content)["body"])
        settings = model.resolve(**body.settings)
        asked.append(Request(model.read(body.messages, settings).sample, settings.sampling, streams=False))
    preparing = time.perf_counter() - start
    model.engine.reserve(rows=ROWS)
    model.engine.run(asked)  # compiles
    alone, whole, shares = [], [], []
    for _ in range(runs):
        model.engine.forget()
        start = time.perf_counter()
        model.engine.run(asked)
        alone.append(time.perf_counter() - start)
        model.engine.forget()
        answerer, start = BatchAnswerer(model, rows=ROWS), time.perf_counter()
        assert len(list(answerer.answer(reads))) == count
        whole.append(time.perf_counter() - start)
        shares.append(answerer.seconds_waited / whole[-1])
    return count / preparing, count / min(alone), count / min(whole), max(shares)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [TASKS, ("digit", "colour")], ids=["all", "images"])
def test_the_engine_is_kept_busy(tmp_path, tasks):
    """Files, JSON and waiting take at most a tenth beyond preparing prompts and the engine, which share the cores.

    On two cores the engine is slowed down as much by a process of its own that prepares as many requests.
    """
    preparing, alone, whole, waited = speeds(tmp_path, 300, tasks)
    print(f"requests a second: {preparing:.1f} prepared, {alone:.1f} by the engine alone, {whole:.1f} of all")
    print(f"{waited:.1%} of the time waiting for media")
    assert whole >= 0.9 / (1 / preparing + 1 / alone)
    assert waited < 0.1
