"""The package as a whole: imports, the command, the first command of the README."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest

from vl3_jax.cli.main import COMMANDS, main

ROOT = pathlib.Path(__file__).parents[1]
# Modules that importing the library must not pull in.
HEAVY = ("torch", "transformers", "tensorflow")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_touches_no_device_and_no_other_framework():
    check = f"""
import sys, vl3_jax, vl3_jax.model, vl3_jax.checkpoint, vl3_jax.processing, vl3_jax.inference.engine
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was touched"
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
"""
    run_python(check)


def test_help_is_instant_and_lists_every_command(capsys):
    assert run_python("import sys, vl3_jax.cli.main; print('jax' in sys.modules)").strip() == "False"
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("argv", [[], ["sing"], ["demo", "--nonsense"]])
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    assert main(["demo", "--max-new-tokens", "0"]) == 2
    error = capsys.readouterr().err
    assert error == "vl3 demo: --max-new-tokens is 0; give a whole number from 1 up to 2147483647\n"


@pytest.mark.usefixtures("fast_compile")
def test_demo_answers_with_the_weights_of_the_package(capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path / "demo.html")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("nano, 1,452,704 parameters")
    right = int(re.search(r"(\d) of 6 right", text)[1])
    assert right >= 4
    assert (tmp_path / "demo.html").stat().st_size > 10_000


def modules(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["vl3_jax", "data_pipelines"])
def test_no_two_modules_share_a_name(package):
    """A command's module is named after the command, whatever else bears that name."""
    names = collections.Counter(
        path.name for path in modules(package) if path.parent.name != "cli" and not path.name.startswith("__")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_public_classes_share_a_name():
    classes = collections.Counter(
        node.name
        for package in ("vl3_jax", "data_pipelines", "launch", "docs", "configs")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []
