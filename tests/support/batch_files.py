"""Files of requests for `vl3 batch`: questions of nano's tasks, with a share that is broken in known ways."""

import dataclasses
import itertools
import json
import pathlib
import random

from data_pipelines.synthetic.encoding import encode_image, encode_video
from data_pipelines.synthetic.registry import example

TASKS = ("addition", "digit", "addition", "colour", "when")
_SEED = 5
_MEDIA = 12  # of each task
# How a request is broken: the code of its failure.
BROKEN = {
    "not json": "invalid_json",
    "no name": "invalid_request",
    "a name again": "duplicate_custom_id",
    "missing file": "unreadable_media",
    "no image": "unreadable_media",
    "two answers": "invalid_request",
    "too long": "context_length_exceeded",
}


@dataclasses.dataclass(frozen=True)
class WrittenRequests:
    """A file of requests.

    Attributes:
      path: The file.
      names: The `custom_id` of each request that can be answered.
      failures: Code of the failure of each other line, by its number.
    """

    path: pathlib.Path
    names: set[str]
    failures: dict[int, str]


def request(name, content, **body):
    """Returns a request of one message."""
    messages = [{"role": "user", "content": content}]
    return {"custom_id": name, "body": {"messages": messages, "max_tokens": 12, **body}}


def write_requests(folder: pathlib.Path, count: int, broken: float = 0.03, tasks=TASKS) -> WrittenRequests:
    """Writes requests, of which a share is broken, in an order of their own, and the media that they name."""
    random_choices = random.Random(_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "no image.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    media = {task: [_content(folder, task, number) for number in range(_MEDIA)] for task in dict.fromkeys(tasks)}
    wrong = set(random_choices.sample(range(1, count), round(count * broken)))
    ways, lines, names, failures = itertools.cycle(BROKEN), [], set(), {}
    for index in range(count):
        name = f"request {index}"
        content = random_choices.choice(media[tasks[index % len(tasks)]])
        sampling = {"temperature": 0.8, "seed": index} if index % 7 == 0 else {}
        line = json.dumps(request(name, content, **sampling))
        if index in wrong:
            way = next(ways)
            line = _broken(folder, way, name, line)
            failures[index + 1] = BROKEN[way]
        else:
            names.add(name)
        lines.append(line + "\n")
    path = folder / "requests.jsonl"
    path.write_text("".join(lines))
    return WrittenRequests(path, names, failures)


def _content(folder: pathlib.Path, task: str, number: int):
    """Returns a question, with its medium as a file or inside the request."""
    sample = example(task, "test", _SEED, number)
    if not sample.media:
        return sample.question
    kind, suffix, encode = ("video", "mov", encode_video) if sample.video else ("image", "png", encode_image)
    path = folder / f"{task} {number}.{suffix}"
    path.write_bytes(encode(sample.media[0].pixels()))
    return [{"type": f"{kind}_url", f"{kind}_url": {"url": str(path)}}, {"type": "text", "text": sample.question}]


def _broken(folder: pathlib.Path, way: str, name: str, line: str) -> str:
    if way == "not json":
        return line[:-3]
    if way == "no name":
        return line.replace('"custom_id"', '"custom"')
    if way == "a name again":
        return line.replace(json.dumps(name), '"request 0"')
    if way == "two answers":
        return line.replace('"max_tokens": 12', '"n": 2')
    if way == "too long":
        return line.replace('"max_tokens": 12', '"max_tokens": 99999')
    file = folder / ("nowhere.png" if way == "missing file" else "no image.png")
    return json.dumps(request(name, [{"type": "image", "image": str(file)}, "What is it?"]))


def read_records(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(records) -> dict[str, str]:
    """Returns the text of each answer by the name of its request."""
    return {
        record["custom_id"]: record["response"]["body"]["choices"][0]["message"]["content"]
        for record in records
        if record["response"]
    }


def check_complete(records, written: WrittenRequests) -> None:
    """Checks that each request has one record, and each broken one its failure."""
    answered = [record["custom_id"] for record in records if record["error"] is None]
    assert sorted(answered) == sorted(written.names)
    failed = [record["error"] for record in records if record["error"] is not None]
    assert {error["line"]: error["code"] for error in failed} == written.failures
    assert len(failed) == len(written.failures)
    assert len({record["id"] for record in records}) == len(records)
