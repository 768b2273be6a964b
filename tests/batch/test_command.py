"""`vl3 batch` with nano: answers, failures by line, resumption with other shards, retries, what it refuses."""

import contextlib
import functools
import http.server
import json
import threading

import pytest

import vl3_jax as vl3
from support.batch_files import check_complete, read_records, request, texts, write_requests
from vl3_jax.cli import generation_flags
from vl3_jax.cli.main import main
from vl3_jax.processing import remote_media

COUNT = 30
pytestmark = pytest.mark.usefixtures("fast_compile")


def batch(written, out, *flags, code=0):
    assert main(["batch", "--model", "nano", "--in", str(written), "--out", str(out), *flags]) == code


def requests_file(folder, *requests):
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))
    return path


@pytest.fixture(scope="module", autouse=True)
def nano():
    """Loads the model once for all commands."""
    model = vl3.load("nano")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_flags, "load_model", lambda arguments: model)
        yield model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_requests(tmp_path_factory.mktemp("requests"), COUNT, 0.25, ("addition", "digit"))


@pytest.fixture(scope="module")
def uninterrupted(written, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    batch(written.path, out)
    return read_records(out)


def test_each_request_is_answered_or_its_failure_named(written, uninterrupted):
    check_complete(uninterrupted, written)
    answer = next(record for record in uninterrupted if record["custom_id"] == "request 0")
    body = answer["response"]["body"]
    assert (answer["response"]["status_code"], body["object"], body["model"]) == (200, "chat.completion", "nano")
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_a_killed_run_is_finished_by_another_number_of_processes(written, uninterrupted, tmp_path, capsys):
    out, lines = tmp_path / "answers.jsonl", [json.dumps(record) + "\n" for record in uninterrupted]
    batch(written.path, out, "--shard", "2/3")  # the settings are there, and a part
    first = len(read_records(tmp_path / "answers-2-of-3.jsonl"))
    assert 0 < first < COUNT
    done = [json.dumps(record) for record in read_records(tmp_path / "answers-2-of-3.jsonl")]
    others = [line for line in lines if json.loads(line)["id"] not in {json.loads(text)["id"] for text in done}]
    out.write_text("".join(others[:5]) + others[5][:40])  # killed while it wrote the sixth
    batch(written.path, out, "--shard", "1/2")
    assert "to be answered by other shards than 1/2" in capsys.readouterr().err
    batch(written.path, out, "--shard", "2/2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]
    records = read_records(out)
    check_complete(records, written)
    assert texts(records) == texts(uninterrupted)
    content = out.read_bytes()
    batch(written.path, out)
    assert out.read_bytes() == content
    assert f"{COUNT} requests: {len(written.names)} answered" in capsys.readouterr().err


def test_failures_are_asked_again_and_changed_requests_answered_anew(tmp_path, capsys):
    image = tmp_path / "digit.png"
    asked = [request("a", "1+2="), request("b", [{"type": "image", "image": str(image)}, "Which digit is this?"])]
    path, out = requests_file(tmp_path, *asked), tmp_path / "out" / "answers.jsonl"
    batch(path, out)
    assert [record["error"] and record["error"]["line"] for record in read_records(out)] in ([None, 2], [2, None])
    from PIL import Image

    Image.new("RGB", (56, 56)).save(image)
    batch(path, out)  # failures stay
    assert "1 failed" in capsys.readouterr().err
    batch(path, out, "--retry")
    assert "2 answered, 0 failed" in capsys.readouterr().err
    before = texts(read_records(out))
    requests_file(tmp_path, request("a", "4+4="), asked[1])
    batch(path, out)
    records = read_records(out)
    assert texts(records).keys() == before.keys()
    assert len(records) == 2


def test_sampling_constraints_and_log_probabilities_of_each_request(tmp_path):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}}
    path = requests_file(
        tmp_path,
        request("free", "1+2="),
        request("form", "1+2=", response_format=form, max_tokens=40),
        request("choice", "1+2=", choices=["yes", "no"]),
        request("likely", "1+2=", logprobs=True, top_logprobs=2),
        request("stop", "1+2=", stop="3", response_format={"type": "text"}),
    )
    batch(path, tmp_path / "answers.jsonl", "--regex", "[a-c]{3}")
    found = texts(read_records(tmp_path / "answers.jsonl"))
    assert json.loads(found["form"])["a"] in ("x", "y")
    assert found["choice"] in ("yes", "no")
    assert len(found["free"]) == 3
    assert set(found["free"]) <= set("abc")
    assert "3" not in found["stop"]
    (likely,) = [each for each in read_records(tmp_path / "answers.jsonl") if each["custom_id"] == "likely"]
    content = likely["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == found["likely"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)


@pytest.fixture
def server(tmp_path):
    """A web server of a folder, at an address that counts as public."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        contextlib.closing(server.socket),
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_media_of_other_machines_only_where_they_are_allowed(server, tmp_path, monkeypatch):
    from PIL import Image

    folder, address = server
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    (folder / "large.png").write_bytes(bytes(2**20))
    parts = [[{"type": "image_url", "image_url": {"url": f"{address}/{name}.png"}}, "?"] for name in ("a", "large")]
    path = requests_file(tmp_path, request("a", parts[0]), request("large", parts[1]))
    batch(path, tmp_path / "refused.jsonl")
    refused = {record["custom_id"]: record["error"]["message"] for record in read_records(tmp_path / "refused.jsonl")}
    assert "--allow-remote" in refused["a"]
    monkeypatch.setattr(remote_media, "is_public", lambda address: True)
    monkeypatch.setattr(remote_media.RemotePolicy.__init__, "__defaults__", _smaller(remote_media.RemotePolicy))
    batch(path, tmp_path / "refused.jsonl", "--retry", "--allow-remote")
    records = {record["custom_id"]: record for record in read_records(tmp_path / "refused.jsonl")}
    assert records["a"]["error"] is None
    assert "larger than 1,000 bytes" in records["large"]["error"]["message"]


def _smaller(policy):
    first, *others = policy.__init__.__defaults__
    assert first == policy().max_bytes
    return 1000, *others


def failure(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["batch", "--model", "nano", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vl3 batch: ")
    assert error.count("\n") == 1, error
    return error


def test_bad_commands_are_one_line(capsys, tmp_path):
    path, out = requests_file(tmp_path, request("a", "1+2=")), tmp_path / "answers.jsonl"
    assert "no such file" in failure(capsys, "--in", tmp_path / "none.jsonl", "--out", out)
    assert "not a file" in failure(capsys, "--in", tmp_path, "--out", out)
    assert "a folder" in failure(capsys, "--in", path, "--out", tmp_path)
    assert "file of requests too" in failure(capsys, "--in", path, "--out", path)
    assert "--shard 3/2" in failure(capsys, "--in", path, "--out", out, "--shard", "3/2")
    assert "gs://" in failure(capsys, "--in", path, "--out", "gs://bucket/answers.jsonl")
    assert "--temperature" in failure(capsys, "--in", path, "--out", out, "--temperature", "-1")
    assert "twice" in failure(capsys, "--in", path, "--out", out, "--adapter", "a=x", "--adapter", "a=y")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no requests" in failure(capsys, "--in", tmp_path / "empty.jsonl", "--out", out)
    assert not out.exists()
    batch(path, out)
    assert "temperature" in failure(capsys, "--in", path, "--out", out, "--temperature", "0.5")


def test_in_python(nano, uninterrupted, written):
    lines = [json.loads(line) for line in written.path.read_text().splitlines()[:3]]
    records = list(vl3.answer_requests(nano, lines))
    assert {record["custom_id"] for record in records} == {line["custom_id"] for line in lines}
    assert texts(records).items() <= texts(uninterrupted).items()
