"""Packing plans in a workdir: saved and loaded."""

import types

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.packing.packing_plan import PackingPlan
from support.full_disk import files_of_at_most
from vl3_jax.errors import InputError
from vl3_jax.training.data import PLANS, load_plans, save_plans

epochs = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=5)


def mixture_with(**planned):
    return types.SimpleNamespace(planned=planned)


def as_plan(lists):
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    samples = np.array([sample for row in lists for sample in row], np.int64)
    return PackingPlan(offsets, samples, np.arange(len(lists), dtype=np.int32))


@given(lists=epochs)
def test_round_trip(lists, tmp_path_factory):
    workdir, plan, loaded = epath.Path(tmp_path_factory.mktemp("run")), as_plan(lists), mixture_with()
    save_plans(mixture_with(a=plan), workdir)
    load_plans(loaded, workdir)
    assert list(loaded.planned) == ["a"]
    found = loaded.planned["a"]
    assert found.offsets.dtype == found.samples.dtype == np.int64
    assert [found[row].tolist() for row in range(len(found))] == lists
    assert found.lengths.tolist() == list(range(len(lists)))


def test_saved_plans_stay(tmp_path):
    workdir = epath.Path(tmp_path)
    save_plans(mixture_with(a=as_plan([[1]])), workdir)
    (workdir / PLANS / "b.npz.partial").write_bytes(b"what a killed job leaves")
    save_plans(mixture_with(a=as_plan([[2]]), b=as_plan([[3]])), workdir, load_plans(mixture_with(), workdir))
    loaded = mixture_with()
    load_plans(loaded, workdir)
    assert {key: rows[0].tolist() for key, rows in loaded.planned.items()} == {"a": [1], "b": [3]}


def test_a_new_run_has_no_plans(tmp_path):
    mixture = mixture_with()
    load_plans(mixture, epath.Path(tmp_path / "new"))
    assert not mixture.planned


@pytest.mark.parametrize("content", [b"", b"PK", b"garbage", None])
def test_a_damaged_plan_is_made_anew(content, tmp_path, caplog):
    workdir = epath.Path(tmp_path)
    save_plans(mixture_with(a=as_plan([[1]]), b=as_plan([[2]])), workdir)
    file = workdir / PLANS / "a.npz"
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    loaded = load_plans(planned := mixture_with(), workdir)
    assert (loaded, [*planned.planned]) == ({"b"}, ["b"])
    assert f"{file} is damaged" in caplog.text
    save_plans(mixture_with(a=as_plan([[3]]), **planned.planned), workdir, loaded)
    assert load_plans(planned, workdir) == {"a", "b"}
    assert planned.planned["a"][0].tolist() == [3]


def test_a_full_disk_is_one_line(tmp_path):
    plan = as_plan([[*range(1000)]] * 10)
    with files_of_at_most(1000), pytest.raises(InputError, match=r"rows: no space left"):
        save_plans(mixture_with(a=plan), epath.Path(tmp_path))
    loaded = load_plans(mixture_with(), epath.Path(tmp_path))
    save_plans(mixture_with(a=plan), epath.Path(tmp_path), loaded)
    assert load_plans(mixture_with(), epath.Path(tmp_path)) == {"a"}
