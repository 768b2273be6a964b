"""launch/finetune_demo.sh as a new user runs it: nano learns what clips show, also for transformers."""

import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest
from launched_scripts import LAUNCH

import vl3_jax as vl3

CPU_SECONDS = 180
NAME, IMAGE = "coffee.png", "a cup of coffee"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Runs the script; gives its folder, its output and the seconds of CPU that it took."""
    folder = tmp_path_factory.mktemp("demo") / "own"
    environment = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("XLA_FLAGS", None)  # the tests' eight devices, on which a step has eight rows
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(LAUNCH / "finetune_demo.sh"), str(folder)], env=environment, capture_output=True, text=True, timeout=1800
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_nano_learns_what_held_out_clips_show(demo):
    _, output, seconds = demo
    before, after = [tuple(map(int, numbers)) for numbers in re.findall(r"(\d+) of (\d+) right", output)]
    assert before[1] == after[1] == 10
    assert before[0] <= 3
    assert after[0] >= 8
    assert seconds < CPU_SECONDS  # not of the clock: other tests may run beside this one


@pytest.mark.slow
def test_the_export_answers_in_transformers(demo, capsys, monkeypatch):
    pytest.importorskip("support.reference")
    monkeypatch.syspath_prepend(str(LAUNCH))
    import finetune_demo

    folder, _, _ = demo
    image = folder / "media" / NAME
    finetune_demo.ask_in_transformers(str(folder / "OUT"), str(image))
    assert capsys.readouterr().out.strip() == IMAGE
    assert vl3.load(folder / "RUN").chat(finetune_demo.IMAGE_QUESTION, images=[str(image)]) == IMAGE
