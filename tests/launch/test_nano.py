"""launch/nano: commands, signals and exit codes with a fake `vl3`; a run in miniature; the report."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from launched_scripts import LAUNCH, ROOT, launched

from data_pipelines.synthetic.registry import EVALUATED_TASKS

TRAIN = LAUNCH / "nano" / "train.py"
TASKS = ["nano/digit", "nano/static"]
PATIENCE = 600  # seconds
pytestmark = pytest.mark.usefixtures("fast_compile")

# A fake `vl3`: appends its arguments to the file `commands`, and trains at once or does what the file `act` says.
FAKE = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
folder = pathlib.Path.cwd()
with open(folder / "commands", "a") as file:
    file.write(" ".join(words) + "\\n")
act = (folder / "act").read_text() if (folder / "act").exists() else ""
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

# Runs all commands in one process, to save the start-up times.
IN_ONE_PROCESS = """
import importlib.util, sys
from vl3_jax.cli.main import main
spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
recipe.Commands.run = lambda self, arguments: main(arguments)
sys.exit(recipe.main(sys.argv[2:]))
"""

SMALL = """
import re
from vl3_jax import config_file

CHANGES = ["model=tiny", "steps=2", "batch.rows=1", "cpu_devices=1", "log.every=1", "log.tensorboard=False"]
CHANGES += ["optimizer.kind=adamw", "remat.vision=none", "remat.text=none"]  # less to compile

def get_config(stage):
    config = config_file.load(f"nano:{stage}", CHANGES)
    for number, dataset in enumerate(config.data.datasets.values()):
        dataset.annotations = tuple(re.sub(r"count=[0-9]+", "count=4", path) for path in dataset.annotations)
        dataset.weight = float(number < 2)
    for name, rate in config.optimizer.learning_rates.items():
        config.optimizer.learning_rates[name] = 1e-3 if rate else 0.0
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


def output_of(job) -> str:
    return job.communicate(timeout=PATIENCE)[0]


def commands_of(folder) -> list[str]:
    return [line.split()[0] for line in (folder / "commands").read_text().splitlines()]


def test_a_dry_run_prints_the_commands():
    result = launched("nano/train.py", "--dry-run", "--runs", "R", "--seed", "3", "--tasks", ",".join(TASKS))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["train", "eval"] * 4 + ["train", "convert"] + ["eval"] * 3
    assert all("--config.seed=3 --config.data.seed=3" in line for line in lines if "train" in line)
    assert [f"--config.init_from=R/nano{stage}" in result.stdout for stage in range(5)] == [True] * 4 + [False]
    assert lines[-2].endswith("--tasks nano/digit,nano/static --out R/blind --count 200 --blind")
    assert lines[-1].endswith("--tasks nano/static --out R/unpruned --count 200 --no-prune")


def test_finished_stages_are_skipped(fake):
    (fake / "act").write_text("convert 1")
    job = recipe(fake)
    out = output_of(job)
    assert job.returncode == 1, out
    assert commands_of(fake) == ["train", "eval"] * 4 + ["train", "convert"]
    (fake / "act").unlink()
    (fake / "commands").unlink()
    job = recipe(fake)
    out = output_of(job)
    assert job.returncode == 0, out
    assert commands_of(fake) == ["eval"] * 4 + ["convert"] + ["eval"] * 3
    assert "runs/nano4 is finished" in out
    job = recipe(fake, "--seed", "1")
    assert "trained with seed 42, now it is 1" in output_of(job)
    assert job.returncode == 2


@pytest.mark.parametrize(("act", "code"), [("train 2", 2), ("eval 1", 1), ("eval 2", 2), ("train 0", 75)])
def test_exit_codes(fake, act, code):
    """A stage that exits with 0 before its last step was stopped from outside."""
    (fake / "act").write_text(act)
    job = recipe(fake)
    out = output_of(job)
    assert job.returncode == code, out
    assert len(commands_of(fake)) == (1 if act.startswith("train") else 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(fake, number):
    (fake / "act").write_text("train listen")
    job = recipe(fake)
    while "ready" not in (line := job.stdout.readline()):
        assert line
    job.send_signal(number)
    out = output_of(job)
    assert job.returncode == 75, out
    assert "the same command resumes" in out
    assert commands_of(fake) == ["train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "R", "--tasks", "nano/tennis", "--dry-run"], "'nano/tennis' is unknown"),
        ([], "--runs"),
    ],
)
def test_bad_flags_are_bad_input(arguments, message):
    result = launched("nano/train.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The whole recipe with two steps per stage."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "small.py").write_text(SMALL)
    flags = ["--config", str(folder / "small.py"), "--seed", "3", "--count", "2", "--tasks", ",".join(TASKS)]
    command = [sys.executable, "-c", IN_ONE_PROCESS, str(TRAIN), "--runs", str(folder / "runs"), *flags]
    environment = os.environ | {"XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.mark.slow
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
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    return {
        name: {"kept": task["kept"], "score": task["metrics"]["Overall"] / 100}
        | {"majority": task["metrics"]["constant answer"] / 100}
        for name, task in tasks.items()
    }


@pytest.fixture
def root(tmp_path):
    """A folder with copies of README.md and docs/nano.md, to be filled."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "nano.md", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def report(*arguments):
    pytest.importorskip("matplotlib", reason="figures need it")
    return launched("nano/report.py", *map(str, arguments))


def test_the_page_shows_the_generated_questions(root):
    result = report("--root", root)
    assert result.returncode == 0, result.stderr
    assert (root / "docs" / "nano.md").read_text() == (ROOT / "docs" / "nano.md").read_text()
    assert (root / "docs" / "nano" / "questions.png").stat().st_size < 200_000
    assert all(f"| {name} |" in (root / "docs" / "nano.md").read_text() for name in EVALUATED_TASKS)


@pytest.mark.slow
def test_the_report_of_a_training(runs, root):
    (root / "goals.json").write_text('{"nano/digit": 0.9}')
    result = report("--runs", runs, "--second", runs, "--goals", root / "goals.json", "--root", root)
    assert result.returncode == 0, result.stderr
    page = (root / "docs" / "nano.md").read_text()
    digit = scores(runs / "eval4")["nano/digit"]
    cells = [f"{100 * digit[name]:.1f}" for name in ("score", "majority")]
    assert f"| digit | exact match | {' | '.join(cells)} | 90.0 | {cells[0]} |" in page
    assert re.search(r"\| 4 \| 2 \| \d+ \| \d+ \| \d+\.\d \|", page)
    assert "vision tokens pruned from almost static videos" in page
    for name in ("loss.png", "stages.png"):
        assert f"(nano/{name})" in page
        assert 2_000 < (root / "docs" / "nano" / name).stat().st_size < 300_000
    results = json.loads((root / "docs" / "nano" / "results.json").read_text())
    assert list(results["tasks"]) == TASKS
    assert results["tasks"]["nano/static"]["unpruned"] == pytest.approx(
        scores(runs / "unpruned")["nano/static"]["score"]
    )


def test_the_pages_have_the_tables_of_the_results():
    sys.path.insert(0, str(LAUNCH / "nano"))
    import report

    results = json.loads((ROOT / "docs" / "nano" / "results.json").read_text())
    page = (ROOT / "docs" / "nano.md").read_text()
    for table in (report.accuracy(results["tasks"]), report.training(results), report.checks(results["tasks"])):
        assert table in page
    assert report.accuracy(results["tasks"]) in (ROOT / "README.md").read_text()


def test_an_unfinished_training_has_no_report(root, tmp_path):
    result = report("--runs", tmp_path, "--root", root)
    assert result.returncode == 2
    assert "no scores" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (root / "docs" / "nano").exists()
