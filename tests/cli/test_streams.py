"""The command beside other commands: stdout closed, full, cut or in another encoding, pipes, and Ctrl-C."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

# `vl3 ask` and `vl3 chat` with a model that repeats the question, so that a process takes a moment only.
COMMAND = """
import sys, time, types
from vl3_jax.cli import generation_flags, main

class Model:
    def answer(self, messages, on_text=None, **settings):
        text = messages[-1].parts[-1]
        while text == "wait":
            try:
                print("waiting", file=sys.stderr, flush=True)
                time.sleep(60)
            except KeyboardInterrupt:  # as a library may
                pass
        processed = types.SimpleNamespace(warnings=[])
        return types.SimpleNamespace(text=text, processed=processed, warnings=[], as_json=lambda: {"text": text})

generation_flags.load_model = lambda arguments: Model()
sys.exit(main.main(sys.argv[1:]))
"""
# A command that was started in the background, as tests may be, ignores Ctrl-C, and so do the commands it starts.
HEED_CTRL_C = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}


def vl3(*arguments, shell="", **environment):
    """Runs the command in a shell, followed by a redirection or pipe."""
    script = f'"$@" {shell}' if shell else 'exec "$@"'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", sys.executable, "-c", COMMAND, *arguments],
        capture_output=True,
        env=ENVIRONMENT | environment,
        timeout=60,
        check=False,
    )


def ask(question, *flags, **options):
    return vl3("ask", "--model", "M", *flags, question, **options)


@pytest.mark.parametrize("shell", [">/dev/full", ">&-"])
@pytest.mark.parametrize("question", ["short", "long " * 20_000])
def test_an_answer_that_cannot_be_written_is_an_error(shell, question):
    done = ask(question, shell=shell)
    assert done.returncode == 1
    assert done.stderr.startswith(b"vl3: stdout cannot be written (")
    assert done.stderr.count(b"\n") == 1


def test_a_reader_that_leaves_ends_the_command_without_a_word():
    done = ask("line\n" * 20_000, shell="| head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"line\n", b"")


def test_closed_streams_are_no_trouble_where_they_are_not_needed():
    done = ask("good", shell="2>&- <&-")
    assert (done.returncode, done.stdout) == (0, b"good\n")
    done = vl3("ask", "--model", "M", "--fps", "0", "bad", shell="2>&-")
    assert (done.returncode, done.stdout) == (2, b"")  # the message goes nowhere, and not to stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_answer_can_be_written_in_any_encoding(encoding):
    text = "caf\u00e9 \U0001f600 \u65e5"
    plain, object_ = ask(text, PYTHONIOENCODING=encoding), ask(text, "--json", PYTHONIOENCODING=encoding)
    assert plain.stdout == f"{text}\n".encode(encoding, "backslashreplace")
    assert (json.loads(object_.stdout), object_.stderr) == ({"text": text}, b"")


def test_words_that_are_not_utf_8_are_refused_by_name():
    done = ask(b"caf\xe9")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"vl3 ask: message 1, part 1: character 4 of the text is ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--seed", "18446744073709551615"],
            "ask: --seed is 18446744073709551615; give a whole number from 0 up to 4294967",
        ),
        (["--top-k", "3000000000"], "ask: --top-k is 3000000000; give a whole number from 0 up to 2147483647"),
        (["--temperature", "nan"], "ask: --temperature is nan; give a number from 0"),
        (["--repetition-penalty", "inf"], "--repetition-penalty is inf"),
        (["--max-visual-tokens", "0"], "--max-visual-tokens is 0; give a whole number from 1"),
        (["--prune-threshold", "nan"], "--prune-threshold is nan"),
        (["--max-frames", "9" * 5000], "argument --max-frames: invalid int value"),
        (["--start=-inf"], "ask: --start is -inf"),
        (["--logprobs", "3"], "add --json"),
        (["--no-prune", "--prune-threshold", "1"], "not allowed with"),
        (["--x\x1b[2J"], "unrecognized arguments: --x\\x1b[2J"),
        (["--image", "n" * 100_000, "--fps", "0"], "--fps is 0"),
    ],
)
def test_flags_that_cannot_be_applied_are_one_line(capsys, flags, message):
    from vl3_jax.cli.main import main

    try:
        code = main(["ask", "--model", "M", *flags, "Q"])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert error.rstrip("\n").isprintable()
    assert message in error
    assert len(error) < 700


@pytest.mark.parametrize("shell", [">/dev/full", "| true"])
def test_help_needs_a_reader_too(shell):
    assert vl3("--help", shell=shell).stderr in (
        b"",
        *vl3("ask", "--model", "M", "x", shell=shell).stderr.splitlines(True),
    )


def test_a_conversation_comes_through_a_pipe():
    talk = json.dumps([{"role": "user", "content": "hello"}])
    for shell in (f"--conversation - <<< '{talk}'", f"--conversation <(echo '{talk}')"):
        assert vl3("ask", "--model", "M", shell=shell).stdout == b"hello\n"


def test_ctrl_c_ends_a_question_at_once():
    command = [sys.executable, "-c", COMMAND, "ask", "--model", "M", "wait"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=HEED_CTRL_C) as process:
        assert process.stderr.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"vl3 ask: stopped\n"


@pytest.mark.parametrize("command", ["train --config stage3:2b,mock --workdir", "convert inspect"])
def test_ctrl_c_ends_any_command_while_it_imports(command, tmp_path):
    words = [sys.executable, "-X", "importtime", "-m", "vl3_jax", *command.split(), str(tmp_path / "run")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, preexec_fn=HEED_CTRL_C) as process:
        while b"jax.version" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        lines = [line for line in process.stderr if not line.startswith(b"import time:")]
        assert process.wait(60) == 130
    assert lines == [b"vl3 %s: stopped\n" % command.split()[0].encode()]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1, 1.5, 2, 3, 4.5, 6])
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_ctrl_c_stops_at_any_moment(seconds, command):
    words = [sys.executable, "-m", "vl3_jax", command, "--model", "nano", "--max-new-tokens", "1000"]
    words += ["Tell me a very long story."] if command == "ask" else []
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **streams, preexec_fn=HEED_CTRL_C) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (-signal.SIGINT, 130, 0)  # the first before Python runs the command
        assert b"Traceback" not in process.stderr.read()
