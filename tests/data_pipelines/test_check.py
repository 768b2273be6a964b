"""Tests that `vl3 data check` tells what it read, and that it, the index and training agree on what is bad."""

import json

import pytest
from sample_datasets import SETTINGS, TOKENIZER, turns, write_lines

from data_pipelines import sample_errors
from data_pipelines.packing.lengths import compute_sample_size
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import SampleError
from data_pipelines.sources import open_source
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.cli.main import main

IMAGE_IN_TEXT = {"type": "text", "text": "Q", "image": "p0.png"}
ANSWER = [{"role": "assistant", "content": "A"}]
DIGITS = b'{"a": ' + b"9" * 5000 + b', "conversations": []}'
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b', "conversations": []}'


def ask(question="<image>\nWhich?", answer="That.", **fields):
    return {"conversations": turns(question, answer), **fields}


def said(*pairs, **fields):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **fields}


GOOD = {
    "ok": ask(image="p0.png"),
    "tags inside": ask("Left <image> and right <image>: same?", image=["p0.png", "p1.png"]),
    "key images": ask(images=["p0.png"]),
    "key videos": ask("<video>Which?", videos="v0.mp4"),
    "an image tag for a video": ask(video="v0.mp4"),
    "a video tag for an image": ask("<video>Which?", image="p0.png"),
    "frames": ask("<video>Which?", video=[["p0.png", "p1.png"]], timestamps=[0, 1]),
    "a role twice": said(("human", "<image>"), ("human", "Q"), ("gpt", "A"), ("gpt", "B"), image="p0.png"),
    "a tool": said(("human", "Weather?"), ("function_call", "{}"), ("observation", "SECRET 31"), ("gpt", "31.")),
    "key system": ask(image="p0.png", system="Be brief."),
    "loss": said(("human", "A?"), ("gpt", "NOT THIS"), ("human", "B?"), ("gpt", "This.")),
    "where a medium came from": ask(image="p0.png", url="http://x/p.jpg", image_name="other/p0.jpg", image_size=[3, 4]),
    "null": ask("Q", image=None, video=None),
    "an empty list beside the images": ask(image=[], images=["p0.png"]),
    "a file of TypeScript": ask("Q", path="src/a.ts"),
}
GOOD["loss"]["conversations"][1]["loss"] = False
BAD = {
    "a tag without a medium": (ask(), sample_errors.TAGS),
    "a null medium with a tag": (ask(image=None), sample_errors.TAGS),
    "a null name": (ask(image=[None]), sample_errors.TAGS),
    "an empty name": (ask("Q", image=""), sample_errors.TAGS),
    "an image without content": (ask(image={"bytes": None, "path": None}), sample_errors.TAGS),
    "both tags": (ask("<image><video>", image="p0.png"), sample_errors.TAGS),
    "a tag in an answer": (ask(answer="<image>", image="p0.png"), sample_errors.TAGS),
    "Qwen's placeholder": (ask("<|vision_start|><|image_pad|><|vision_end|>Q", image="p0.png"), sample_errors.TAGS),
    "a numbered placeholder": (ask("<image_1>Q", image="p0.png"), sample_errors.TAGS),
    "LLaVA's placeholder": (ask("<image_placeholder>Q", image="p0.png"), sample_errors.TAGS),
    "a paired tag": (ask("<img>p0.png</img>Q"), sample_errors.TAGS),
    "sound": (ask("Q", audio="a.wav"), sample_errors.TAGS),
    "another key": (ask("Q", img="p0.png"), sample_errors.TAGS),
    "a second image": (ask(image="p0.png", image2="p1.png"), sample_errors.TAGS),
    "a file in any key": (ask("Q", source="clips/a.mp4"), sample_errors.TAGS),
    "sound of a turn": (said(("human", "Q"), ("gpt", "A")), sample_errors.TAGS),
    "nested media": (ask("Q", extra={"pages": [{"path": "p0.png"}]}), sample_errors.TAGS),
    "an image of a turn": (said(("human", "Q"), ("gpt", "A")), sample_errors.TAGS),
    "an image of a text": ({"messages": [{"role": "user", "content": [IMAGE_IN_TEXT]}, *ANSWER]}, sample_errors.TAGS),
    "both keys": (ask(image="p0.png", images=["p1.png"]), sample_errors.BAD_RECORD),
    "an unknown role": (said(("human", "Q"), ("humna", "USER"), ("gpt", "A")), sample_errors.BAD_RECORD),
    "a role that is a list": ({"conversations": [{"from": [], "value": ""}]}, sample_errors.BAD_RECORD),
    "an empty answer": (ask(answer="", image="p0.png"), sample_errors.BAD_RECORD),
    "a blank answer": (ask("Q", " \n"), sample_errors.BAD_RECORD),
    "loss of a question": ({"conversations": [{"from": "human", "value": "Q", "loss": True}, *turns("Q", "A")]},
                           sample_errors.BAD_RECORD),
    "half a loss": ({"conversations": [*turns("Q", "A"), {"from": "gpt", "value": "B", "loss": 0.5}]},
                    sample_errors.BAD_RECORD),
    "nothing to learn": ({"conversations": [turns("Q", "A")[0], {"from": "gpt", "value": "A", "loss": False}]},
                         sample_errors.EMPTY),
    "system twice": (said(("system", "A"), ("human", "Q"), ("gpt", "A"), system="B"), sample_errors.BAD_RECORD),
    "half a character": (ask("Q", "\ud83d"), sample_errors.NOT_UTF8),
    "half a character in a name": (ask(image="a\ud83d.png"), sample_errors.MISSING),
    "a time as text": (ask("Q", video="v0.mp4", start_time="1.0"), sample_errors.BAD_RECORD),
    "a time of 10^400": (ask("Q", video="v0.mp4", end_time=10**400), sample_errors.BAD_RECORD),
    "a time that is no number": (ask("Q", video="v0.mp4", start_time=float("nan")), sample_errors.BAD_RECORD),
    "times of frames": (ask("Q", video=[["p0.png"]], timestamps=[10**400]), sample_errors.BAD_RECORD),
    "frames as videos": (ask("Q", video=["p0.png", "p1.png"]), sample_errors.BAD_RECORD),
    "a million frames a second": (ask("Q", video={"path": "v0.mp4", "fps": 1e6}), sample_errors.BAD_RECORD),
    "two beginnings": (ask("Q", video={"path": "v0.mp4", "start": 0}, start_time=1), sample_errors.BAD_RECORD),
    "another layout": ({"instruction": "Q", "output": "A"}, sample_errors.BAD_RECORD),
    "two layouts": (ask("Q", messages=[]), sample_errors.BAD_RECORD),
    "a stream's tag": ({"video": "v0.mp4", "stream": True, "conversation": [
        {"role": "user", "content": "<video>Tell.", "time": 0.0}, {"role": "assistant", "content": "A", "time": 1.0}]},
        sample_errors.TAGS),
    "a stream before its video": ({"video": "v0.mp4", "stream": True, "conversation": [
        {"role": "assistant", "content": "A", "time": -10**400}]}, sample_errors.BAD_RECORD),
    "a stream by name": ({"video": "v0.mp4", "stream": "no", "conversation": []}, sample_errors.BAD_RECORD),
    "5000 digits": (DIGITS, sample_errors.NOT_JSON),
    "100,000 levels": (DEEP, sample_errors.NOT_JSON),
    "a key twice": (b'{"image": "p0.png", "image": "p1.png", "conversations": []}', sample_errors.NOT_JSON),
    "a number": (b"3", sample_errors.BAD_RECORD),
}  # fmt: skip
BAD["an image of a turn"][0]["conversations"][0]["image"] = ["p0.png"]
BAD["sound of a turn"][0]["conversations"][0]["audio"] = "a"
RECORDS = [*GOOD.values(), *(record for record, _ in BAD.values())]
NAMES = [*GOOD, *BAD]
KINDS = [None] * len(GOOD) + [kind for _, kind in BAD.values()]


@pytest.fixture(scope="module")
def folder(folder):
    write_lines(folder / "a.jsonl", RECORDS)
    return folder


@pytest.fixture
def check(folder, capfd, tmp_path):
    """Returns a function that checks a file and returns what `--json` and `--report` give."""

    def call(path, *flags):
        report = tmp_path / "report.jsonl"
        argv = ["data", "check", "--annotations", str(path), "--media", str(folder), "--workers", "0", "--json"]
        code = main([*argv, "--report", str(report), *flags])
        result = json.loads(capfd.readouterr().out)
        problems = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
        assert problems == result["problems"]
        assert code == (1 if problems else 0)
        assert result["bad"] == len(problems)
        return result

    return call


def number_of(problem):
    return int(problem["where"].rsplit("line ", 1)[1]) - 1


def test_good_and_bad_records(check, folder):
    result = check(folder / "a.jsonl")
    found = {NAMES[number_of(problem)]: problem["kind"] for problem in result["problems"]}
    assert found == {name: kind for name, kind in zip(NAMES, KINDS, strict=True) if kind}
    assert all(problem["message"].isprintable() and len(problem["message"]) < 500 for problem in result["problems"])
    assert result["samples"] == len(RECORDS)
    assert (result["images"], result["videos"]) == (9, 3)
    assert result["turns"]["learned"] == {"assistant": len(GOOD) + 2}
    assert result["turns"]["shown"] == {"user": len(GOOD) + 2, "tool": 1, "system": 1, "assistant": 1}
    assert result["unknown_keys"] == {"image_name": 1, "image_size": 1, "path": 1, "url": 1}


def test_index_and_training_agree_with_the_check(folder, capfd, tmp_path):
    argv = ["--annotations", str(folder / "a.jsonl"), "--media", str(folder), "--tokenizer", str(TOKENIZER)]
    assert main(["data", "index", *argv, "--workers", "0"]) == 0
    out = capfd.readouterr().out
    assert f"{len(RECORDS)} samples, {len(BAD)} bad" in out
    assert "keys that nothing reads: image_name 1, image_size 1, path 1, url 1" in out
    builder, source, media = SampleBuilder(TOKENIZER, SETTINGS), open_source(argv[1]), MediaResolver(str(folder))
    for number, (name, kind) in enumerate(zip(NAMES, KINDS, strict=True)):
        measured = builder.measure(source[number], media)
        assert (measured.kind if isinstance(measured, SampleError) else None) == kind, name
        if kind is None:
            sample = builder.sample(source[number], media, compute_sample_size(measured[0], SETTINGS), (0, 0))
            learned = builder.tokenizer.decode(sample.tokens[sample.loss_weight > 0].tolist(), False)
            shown = builder.tokenizer.decode(sample.tokens[~sample.is_vision].tolist(), False)
            assert "NOT THIS" not in learned, name
            assert "SECRET" not in learned, name
            assert ("<image>" in shown, "<video>" in shown) == (False, False), name
            assert shown.startswith("<|im_start|>system\nBe brief.") == (name == "key system")


def test_left_out_turns_and_unknown_keys_are_told(check, folder, tmp_path):
    greeted = said(("gpt", "Hello!"), ("system", "S"), ("human", "Q"), ("gpt", "A"), data_source="x", id="1")
    greeted["conversations"][3]["weight"] = 1
    greeted["conversations"][3]["score"] = 0.5
    result = check(write_lines(tmp_path / "a.jsonl", [greeted, greeted]))
    assert result["turns"] == {
        "learned": {"assistant": 2},
        "shown": {"system": 2, "user": 2},
        "left_out": {"assistant": 2},
    }
    assert result["unknown_keys"] == {"data_source": 2, "turn.score": 2}
