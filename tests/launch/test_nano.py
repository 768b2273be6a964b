"""The recipe of nano: plan, signals and exit codes with a stand-in for `vl3`; really run, in miniature; its report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from launched_scripts import LAUNCH, ROOT, launched

from data_pipelines.synthetic.registry import JUDGED

TRAIN = LAUNCH / "nano" / "train.py"
TASKS = ["nano/digit", "nano/static"]
PATIENCE = 600  # seconds

# Stands in for `vl3`: notes what it was asked, and trains at once or does what the file `act` says.
FAKE = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
here = pathlib.Path.cwd()
with open(here / "asked", "a") as file:
    file.write(" ".join(words) + "\\n")
act = (here / "act").read_text() if (here / "act").exists() else ""
if act.startswith(words[0]):
    code = act.split()[1]
    if code == "listen":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        print("ready", flush=True)
        time.sleep(60)
    sys.exit(int(code))
if words[0] == "train":
    workdir = pathlib.Path(words[words.index("--workdir") + 1])
    (workdir / "checkpoints" / "2").mkdir(parents=True)
    seeds = [int(word.split("=")[1]) for word in words if word.startswith("--config.seed=")]
    config = {"steps": 2, "seed": seeds[0] if seeds else 42}
    (workdir / "config.json").write_text(json.dumps({"config": config}))
"""

# Every command in one process, which starts once; the test's own small configurations.
IN_ONE_PROCESS = """
import importlib.util, sys
from vl3_jax.cli.main import main
spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
recipe.Commands.run = lambda self, words: main(words)
sys.exit(recipe.main(sys.argv[2:]))
"""

SMALL = """
import re
from vl3_jax import config_file

CHANGES = ["model=tiny", "steps=2", "batch.rows=1", "cpu_devices=1", "log.every=1", "log.tensorboard=False"]
CHANGES += ["optimizer.kind=adamw", "remat.vision=none", "remat.text=none"]  # less to compile

def get_config():
    config = config_file.load({path!r}, CHANGES)
    for number, one in enumerate(config.data.datasets.values()):
        one.annotations = tuple(re.sub(r"count=[0-9]+", "count=4", path) for path in one.annotations)
        one.weight = float(number < 2)
    for name, rate in config.optimizer.rates.items():
        config.optimizer.rates[name] = 1e-3 if rate else 0.0
    return config
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "vl3_jax" / "cli").mkdir(parents=True)
    (tmp_path / "vl3_jax" / "__init__.py").touch()
    (tmp_path / "vl3_jax" / "cli" / "__init__.py").touch()
    (tmp_path / "vl3_jax" / "cli" / "main.py").write_text(FAKE)
    return tmp_path


def recipe(folder, *flags, **options):
    command = [sys.executable, str(TRAIN), "--runs", "runs", *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def outcome(job) -> str:
    return job.communicate(timeout=PATIENCE)[0]


def asked(folder) -> list[str]:
    return [line.split()[0] for line in (folder / "asked").read_text().splitlines()]


def test_a_dry_run_prints_the_commands():
    found = launched("nano/train.py", "--dry-run", "--runs", "R", "--seed", "3", "--tasks", ",".join(TASKS))
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["train", "eval"] * 4 + ["train", "convert"] + ["eval"] * 3
    assert all("--config.seed=3 --config.data.seed=3" in line for line in lines if "train" in line)
    assert [f"--config.init_from=R/nano{stage}" in found.stdout for stage in range(5)] == [True] * 4 + [False]
    assert lines[-2].endswith("--tasks nano/digit,nano/static --out R/blind --count 200 --blind")
    assert lines[-1].endswith("--tasks nano/static --out R/unpruned --count 200 --no-prune")


def test_what_is_finished_is_left_as_it_is(fake):
    (fake / "act").write_text("convert 1")
    job = recipe(fake)
    out = outcome(job)
    assert job.returncode == 1, out
    assert asked(fake) == ["train", "eval"] * 4 + ["train", "convert"]
    (fake / "act").unlink()
    (fake / "asked").unlink()
    job = recipe(fake)
    out = outcome(job)
    assert job.returncode == 0, out
    assert asked(fake) == ["eval"] * 4 + ["convert"] + ["eval"] * 3
    assert "runs/nano4 is finished" in out
    job = recipe(fake, "--seed", "1")
    assert "trained with seed 42, now it is 1" in outcome(job)
    assert job.returncode == 2


@pytest.mark.parametrize(("act", "code"), [("train 2", 2), ("eval 1", 1), ("eval 2", 2), ("train 0", 75)])
def test_exit_codes(fake, act, code):
    """A stage that ends well before its last step was stopped by someone else."""
    (fake / "act").write_text(act)
    job = recipe(fake)
    out = outcome(job)
    assert job.returncode == code, out
    assert len(asked(fake)) == (1 if act.startswith("train") else 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(fake, number):
    (fake / "act").write_text("train listen")
    job = recipe(fake)
    while "ready" not in (line := job.stdout.readline()):
        assert line
    job.send_signal(number)
    out = outcome(job)
    assert job.returncode == 75, out
    assert "the same command goes on" in out
    assert asked(fake) == ["train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "R", "--tasks", "nano/tennis", "--dry-run"], "'nano/tennis' is unknown"),
        ([], "--runs"),
    ],
)
def test_bad_flags_are_bad_input(arguments, message):
    found = launched("nano/train.py", *arguments)
    assert found.returncode == 2
    assert message in found.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The whole recipe, two steps a stage."""
    folder = tmp_path_factory.mktemp("recipe")
    for stage in range(5):
        path = str(ROOT / "configs" / f"nano_stage{stage}.py")
        (folder / f"nano_stage{stage}.py").write_text(SMALL.format(path=path))
    flags = ["--configs", str(folder), "--seed", "3", "--count", "2", "--tasks", ",".join(TASKS)]
    command = [sys.executable, "-c", IN_ONE_PROCESS, str(TRAIN), "--runs", str(folder / "runs"), *flags]
    environment = os.environ | {"XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


def test_the_recipe_in_miniature(runs):
    for stage in range(5):
        assert (runs / f"nano{stage}" / "checkpoints" / "2").is_dir()
        config = json.loads((runs / f"nano{stage}" / "config.json").read_text())["config"]
        assert (config["seed"], config["data"]["seed"]) == (3, 3)
        assert config["init_from"] == (str(runs / f"nano{stage - 1}") if stage else "")
        assert list(scores(runs / f"eval{stage}")) == TASKS
    assert (runs / "export" / "model.safetensors").is_file()
    assert (runs / "export" / "tokenizer.json").is_file()
    assert list(scores(runs / "blind")) == TASKS
    assert scores(runs / "unpruned")["nano/static"]["kept"] == 1
    assert scores(runs / "eval4")["nano/static"]["kept"] <= 0.5


def scores(folder):
    return json.loads((folder / "scores.json").read_text())["tasks"]


@pytest.fixture
def root(tmp_path):
    """README.md and docs/nano.md, to be filled."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "nano.md", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def report(*arguments):
    pytest.importorskip("matplotlib", reason="figures need it")
    return launched("nano/report.py", *map(str, arguments))


def test_the_page_shows_the_questions_as_they_are_drawn(root):
    found = report("--root", root)
    assert found.returncode == 0, found.stderr
    assert (root / "docs" / "nano.md").read_text() == (ROOT / "docs" / "nano.md").read_text()
    assert (root / "docs" / "nano" / "questions.png").stat().st_size < 200_000
    assert all(f"| {name} |" in (root / "docs" / "nano.md").read_text() for name in JUDGED)


def test_the_report_of_a_training(runs, root):
    (root / "goals.json").write_text('{"nano/digit": 0.9}')
    found = report("--runs", runs, "--second", runs, "--goals", root / "goals.json", "--root", root)
    assert found.returncode == 0, found.stderr
    page = (root / "docs" / "nano.md").read_text()
    digit = scores(runs / "eval4")["nano/digit"]
    wanted = [f"{100 * digit[name]:.1f}" for name in ("score", "majority")]
    assert f"| digit | exact match | {' | '.join(wanted)} | 90.0 | {wanted[0]} |" in page
    assert re.search(r"\| 4 \| 2 \| \d+ \| \d+ \| \d+\.\d \|", page)
    assert "vision tokens pruned from nearly still clips" in page
    for name in ("loss.png", "stages.png"):
        assert f"(nano/{name})" in page
        assert 2_000 < (root / "docs" / "nano" / name).stat().st_size < 300_000
    results = json.loads((root / "docs" / "nano" / "results.json").read_text())
    assert list(results["tasks"]) == TASKS
    assert results["tasks"]["nano/static"]["unpruned"] == scores(runs / "unpruned")["nano/static"]["score"]


def test_the_pages_tell_the_results():
    results = ROOT / "docs" / "nano" / "results.json"
    sys.path.insert(0, str(LAUNCH / "nano"))
    import report

    found = json.loads(results.read_text())
    page = (ROOT / "docs" / "nano.md").read_text()
    for table in (report.accuracy(found["tasks"]), report.training(found), report.checks(found["tasks"])):
        assert table in page
    assert report.accuracy(found["tasks"]) in (ROOT / "README.md").read_text()


def test_a_training_that_is_not_finished_has_no_report(root, tmp_path):
    found = report("--runs", tmp_path, "--root", root)
    assert found.returncode == 2
    assert "no scores" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (root / "docs" / "nano").exists()
