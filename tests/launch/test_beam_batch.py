"""The Beam pipeline: its local runner gives the answers of the command, and a dry run for Dataflow submits nothing."""

import pytest
from launched_scripts import launched

from support.batch_files import check_complete, read_records, texts, write_requests
from vl3_jax.cli.main import main

pytest.importorskip("apache_beam", reason="needs pip install -e '.[beam]'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compile")]
STEPS = ["File", "Lines", "Names", "Duplicates", "Requests", "Lists", "Answers", "Files"]


def without_time(record):
    """Returns a record without when it was made."""
    if record["response"]:
        record["response"]["body"]["created"] = 0
    return record


def test_the_local_runner_gives_the_answers_of_the_command(tmp_path):
    written = write_requests(tmp_path / "requests", 60, broken=0.2)
    out = tmp_path / "answers.jsonl"
    assert main(["batch", "--model", "nano", "--in", str(written.path), "--out", str(out)]) == 0
    files = ("--in", str(written.path), "--out", str(tmp_path / "beam.jsonl"), "--files", "3")
    result = launched("beam_batch.py", "--model", "nano", *files)
    assert result.returncode == 0, result.stderr
    parts = sorted(tmp_path.glob("beam-0000?-of-00003.jsonl"))
    assert len(parts) == 3
    records = [record for part in parts for record in read_records(part)]
    check_complete(records, written)
    assert texts(records) == texts(read_records(out))
    found, expected = ({each["id"]: without_time(each) for each in some} for some in (records, read_records(out)))
    assert found == expected


def test_a_dry_run_for_dataflow():
    files = ("--in", "gs://bucket/requests.jsonl", "--out", "gs://bucket/answers.jsonl", "--dry-run")
    dataflow = ("--runner", "DataflowRunner", "--project", "project", "--region", "us-central1")
    machines = ("--temp_location", "gs://bucket/tmp", "--machine_type", "g2-standard-8")
    result = launched("beam_batch.py", "--model", "gs://bucket/model", *files, *dataflow, *machines)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[: len(STEPS)] == STEPS
    assert "  machine_type: g2-standard-8" in lines
    for arguments, text in (
        ((*files, "--runner", "DataflowRunner"), "project"),
        ((*files, "--temperature", "-1"), "--temperature"),
    ):
        result = launched("beam_batch.py", "--model", "nano", *arguments)
        assert result.returncode == 2
        assert result.stderr.splitlines()[-1].startswith("beam_batch.py: ")
        assert text in result.stderr.splitlines()[-1]
