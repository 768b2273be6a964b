"""Configuration files and their changes."""

import pytest

from vl3_jax import config_file
from vl3_jax.errors import InputError

FILE = """
from ml_collections import ConfigDict

def get_config({parameters}):
    return ConfigDict({{"count": 3, "rate": 0.5, "on": True, "name": "a", "files": ("x",), "a": {{"a": 1}}}})
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "plain.py").write_text(FILE.format(parameters=""))
    (tmp_path / "varied.py").write_text(FILE.format(parameters='variant=""'))
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "raising.py").write_text("\ndef get_config():\n    return 1 / 0\n")
    (tmp_path / "nothing.py").write_text("def get_config():\n    pass\n")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("count=4", "count", 4),
        ("rate=2", "rate", 2.0),
        ("rate=1e-3", "rate", 0.001),
        ("on=false", "on", False),
        ("on=True", "on", True),
        ("name=b=c", "name", "b=c"),
        ("files=one", "files", ("one",)),
        ("files=('p', 'q')", "files", ("p", "q")),
    ],
)
def test_values_have_the_type_that_was_there(path, change, key, value):
    found = config_file.load(path / "plain.py", [change])[key]
    assert (found, type(found)) == (value, type(value))


def test_groups_and_variants(path):
    assert config_file.load(path / "plain.py", ["a.a=5"]).a.a == 5
    assert config_file.load(f"{path}/varied.py:mock").count == 3


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("none.py", [], "none.py: no such configuration"),
        ("empty.py", [], r"empty.py: has no get_config\(\)"),
        ("broken.py", [], "broken.py, line 1"),
        ("raising.py", [], r"raising.py, line 3: ZeroDivisionError: division by zero"),
        ("nothing.py", [], r"nothing.py: get_config\(\) returns a NoneType; return settings or a ConfigDict"),
        ("plain.py", ["rate=True"], "rate=True: give a value like 0.5"),
        ("plain.py", ["rate=" + "9" * 400], "rate=999.*999: give a value like 0.5"),
        ("plain.py", ["count=" + "-" * 20000], "count=-.*-: give a value like 3"),
        ("plain.py:mock", [], "has no variants, so leave out 'mock'"),
        ("plain.py", ["count"], "count: give a change as key=value"),
        ("plain.py", ["cuont=1"], "'cuont' is unknown; there are a, count"),
        ("plain.py", ["a.b=1"], "'b' is unknown; there are a"),
        ("plain.py", ["count.b=1"], "'b' is unknown; there are nothing"),
        ("plain.py", ["count=many"], "count=many: give a value like 3"),
        ("plain.py", ["count=1.5"], "count=1.5: give a value like 3"),
        ("plain.py", ["a=1"], "a: a group of settings; change one of a"),
    ],
)
def test_bad_input_is_refused(path, file, changes, message):
    with pytest.raises(InputError, match=message):
        config_file.load(f"{path}/{file}", changes)
