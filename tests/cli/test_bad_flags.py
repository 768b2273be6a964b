"""A table of values for the numbers that commands take as flags; each is refused in one line."""

import pytest

from vl3_jax.cli.main import main

PLAN = ("plan", "--topology", "v5e:2x2")
SERVE = (*PLAN, "--serve", "tiny")
EVAL = ("eval", "--model", "nano", "--tasks", "nano", "--out", "unused")
VERIFY = ("convert", "verify", "a", "b")
INIT = ("convert", "init", "out", "--vision", "a", "--llm", "b")
SHOW = ("data", "show", "--annotations", "a.jsonl", "--tokenizer", "nano")
STATS = ("data", "stats", "--annotations", "a.jsonl", "--tokenizer", "nano")
WRITE = ("data", "write", "--annotations", "a.jsonl", "--out", "unused")
TRAIN = ("train", "--config", "stage3:2b,mock", "--workdir", "unused")
ASK = ("ask", "--model", "nano", "question")
WORDS = ("", "many", "nan", "1e400", "9" * 5000, "None", "0x", "1_0x", "-")
REFUSED = [
    ((*SERVE, "--rows"), ("0", "-1", "65537", *WORDS)),
    ((*SERVE, "--prompt"), ("0", "99999999999")),
    ((*SERVE, "--new"), ("0", "1.5")),
    ((*SERVE, "--patches"), ("-1", "99999999999")),
    (
        (*SERVE, "--mesh"),
        ("", "data", "data=", "data=x", "data=2,data=2", "pipe=4", "data=3", "data=9999999999", "data=0"),
    ),
    ((*PLAN, "--config", "stage4:2b", "--slices"), ("0", "-1", "1025", *WORDS)),
    ((*PLAN, "--config"), ("stage9", "", "stage4:9b", "/nowhere.py", "/", "stage4:2b,7b")),
    (("plan", "--serve", "tiny", "--topology"), ("", "v5e", "v5e:0x0", "v5e:2x2x2", "v9-8", "v5e:" + "9" * 40 + "x1")),
    ((*EVAL, "--count"), ("0", "-1", "2147483648", *WORDS)),
    ((*EVAL, "--seed"), ("-1", "4294967296")),
    ((*EVAL, "--batch"), ("0", "4097", *WORDS)),
    ((*VERIFY, "--tolerance"), ("-1", "nan", "inf", "few")),
    ((*INIT, "--seed"), ("-1", "4294967296", "1.0")),
    (("demo", "--seed"), ("-1", "4294967296", *WORDS)),
    (("demo", "--max-new-tokens"), ("0", "-1", "2147483648")),
    ((*SHOW, "--row"), ("-1", "first")),
    ((*SHOW, "--workers"), ("-1", "1025")),
    ((*STATS, "--measure"), ("-1", "1e3")),
    ((*WRITE, "--samples-per-shard"), ("0", "-1", "2147483648")),
    (("bench", "loss", "--rounds"), ("0", "10001", *WORDS)),
    (("bench", "gpu", "--minutes"), ("0", "-1", "inf", "nan", "10081")),
    ((*TRAIN, "--processes"), ("0", "2", "-1", *WORDS)),
    ((*TRAIN, "--process-id"), ("-1", "1")),
    ((*TRAIN, "--coordinator"), ("nowhere", "localhost", ":1", "localhost:port", "localhost:99999")),
    ((*ASK, "--temperature"), ("-1", "nan", "1001")),
    ((*ASK, "--top-p"), ("0", "1.1")),
    ((*ASK, "--fps"), ("0", "-1", "inf")),
]


@pytest.mark.parametrize(("command", "values"), REFUSED, ids=lambda value: " ".join(value)[-40:])
def test_refused_in_one_line(command, values, capsys):
    numbered = ("--processes", "2", "--process-id", "0") if command[-1] == "--coordinator" else ()
    for value in values:
        try:
            code = main([*command[:-1], f"{command[-1]}={value}", *numbered])
        except SystemExit as error:  # from argparse
            code = error.code
        assert code == 2, f"{command[-1]}={value[:20]} is taken"
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vl3 {command[0]}")
        assert len(line) < 1000
