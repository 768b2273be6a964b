"""The judge, asked over HTTP from a server on this machine."""

import contextlib
import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.benchmark_items import CASES
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks, judges, layouts, results
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.evaluation.judges import Judge, JudgeError, JudgeSettings

FIELDS = {"question": "What is it?", "target": "dog", "prediction": "a dog", "response": "a dog"}
# A reply that accepts an answer, and one that does not, for each benchmark with a judge.
VERDICTS = {
    "ChartQA": ("True", "False"),
    "RealWorldQA": ("true.", "False"),
    "BLINK": ("(B)", "(Z)"),
    "MathVista": ("B", "none"),
    "mmvu": ('{"extracted_answer": "B", "correct": true}', '{"extracted_answer": "A", "correct": false}'),
    "activitynet_qa": ("{'pred': 'yes', 'score': 4}", "{'pred': 'no', 'score': 1}"),
    "tempcompass": ("Reasoning: seen\nAnswer: A", "Answer: None"),
}


@contextlib.contextmanager
def serve(answer):
    """Serves chat completions; `answer(body)` gives the reply, or an HTTP status. Yields the URL and the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            reply = answer(body)
            status = reply if isinstance(reply, int) else 200
            content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make(url, folder, **settings):
    return Judge(JudgeSettings(url=url, model="m", cache=str(folder / "judge.jsonl"), **settings), pause=0.001)


def test_asks_once_and_keeps_the_reply(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serve(lambda body: " True ") as (url, requests):
        judge = make(url, tmp_path)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(lambda _: judge("ChartQA", FIELDS), range(16))) == {"True"}
        judge.close()
        again = make(url, tmp_path)
        assert again("ChartQA", FIELDS) == "True"
        again("ChartQA", FIELDS | {"target": "cat"})
        again.close()
    assert [path for path, _, _ in requests] == ["/v1/chat/completions"] * 2
    assert requests[0][1] == "Bearer secret"
    body = requests[0][2]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.7, 800)
    assert "Reference answer: dog" in body["messages"][-1]["content"]
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()


def test_asks_again_after_errors_and_replies_without_a_verdict(tmp_path):
    replies = iter([503, 429, "I cannot say", "False"])
    with serve(lambda body: next(replies)) as (url, requests):
        assert make(url, tmp_path)("ChartQA", FIELDS) == "False"
    assert len(requests) == 4


def test_gives_up(tmp_path):
    with serve(lambda body: "hm") as (url, requests):
        judge = make(url, tmp_path, attempts=3)
        with pytest.raises(JudgeError, match="no verdict in 'hm' after 3 attempts"):
            judge("BLINK", FIELDS | {"prompt": "Which?", "options": "(A) x"})
    assert len(requests) == 3
    assert (tmp_path / "judge.jsonl").read_text() == ""
    with pytest.raises(JudgeError, match="after 2 attempts"):
        make("http://127.0.0.1:9", tmp_path, attempts=2)("ChartQA", FIELDS)


@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_refusal_stops_at_once(tmp_path, status):
    with serve(lambda body: status) as (url, requests), pytest.raises(InputError, match=f"HTTP {status}"):
        make(url, tmp_path)("ChartQA", FIELDS)
    assert len(requests) == 1


@pytest.mark.parametrize("name", VERDICTS)
def test_each_verdict_is_read(name, tmp_path):
    """Each benchmark asks with its own prompt, and reads both verdicts."""
    case = CASES[name]
    layouts.write(name, case.rows, tmp_path / name)
    (benchmark,) = benchmarks.find([name])
    index = 1 if name == "tempcompass" else 0
    item = benchmark.load(tmp_path)[index]
    for reply, score in zip(VERDICTS[name], (1.0, 0.0), strict=True):
        with serve(lambda body, reply=reply: reply) as (url, requests):
            judge = make(url, tmp_path / str(score))
            verdict = benchmark.score("it is hard to tell", item.reference, Scoring(judge=judge))
            judge.close()
        assert verdict.score == score
        assert len(requests) == 1
        text = json.dumps(requests[0][2]["messages"])
        assert not judges._PLACEHOLDER.search(text)


def test_scores_with_a_judge_and_counts_its_failures(capsys, tmp_path):
    layouts.write("activitynet_qa", CASES["activitynet_qa"].rows, tmp_path / "activitynet_qa")
    (benchmark,) = benchmarks.find(["activitynet_qa"])
    items = benchmark.load(tmp_path)
    records = [results.answer_record(benchmark.task, item, text) for item, text in zip(items, "xy", strict=True)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))

    def answer(body):
        return "{'pred': 'yes', 'score': 5}" if "Predicted answer: x" in body["messages"][-1]["content"] else "hm"

    with serve(answer) as (url, _):
        command = ["eval", "--score-only", str(answers), "--judge", url, "--judge-model", "m", "--judge-attempts", "1"]
        assert main(command) == 2
    captured = capsys.readouterr()
    assert "activitynet_qa: 1" in captured.err
    summary = json.loads((tmp_path / "results.json").read_text())["tasks"]["activitynet_qa"]
    assert summary["metrics"] == {"total": 100.0, "total_score": 5.0}
    assert (summary["n"], summary["n_error"], summary["judge"]) == (1, 1, "asked")


def test_without_a_judge_the_offline_rules_are_named(tmp_path):
    reference = {"target": "dog", "task_type": 5}
    record = {"id": "activitynet_qa/0", "task": "activitynet_qa", "answer": "a dog", "reference": reference}
    summary = results.score_tasks([record], Scoring())["activitynet_qa"].summary
    assert summary["metrics"] == {"total": 100.0}
    assert summary["variant"] == "offline"
    assert "not comparable" in summary["judge"]


def test_other_prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"ChartQA": {"user": "Q {question} T {target} P {prediction} {other}"}}))
    with serve(lambda body: "true") as (url, requests):
        assert make(url, tmp_path, prompts=str(path))("ChartQA", FIELDS) == "true"
    assert requests[0][2]["messages"] == [{"role": "user", "content": "Q What is it? T dog P a dog {other}"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"ChartQA": {"user": "{question} {target}"}}', "lacks {prediction}"),
        ('{"Tennis": {"user": ""}}', "unknown prompt 'Tennis'"),
        ('{"ChartQA": "text"}', "not of the form"),
        ("[", "not of the form"),
    ],
)
def test_bad_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        judges.read_prompts(path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "http://host"], "--judge-model"),
        (["--judge", "host", "--judge-model", "m"], "http://"),
        (["--judge", "http://host", "--judge-model", "m", "--judge-threads", "0"], "threads"),
    ],
)
def test_bad_flags(capsys, tmp_path, flags, message):
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "AI2D/1", "task": "AI2D", "answer": "A", "reference": {"target": 0}}\n')
    assert main(["eval", "--score-only", str(answers), *flags]) == 2
    assert message in capsys.readouterr().err
