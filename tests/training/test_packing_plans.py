"""Planned rows in a workdir, and back."""

import types

import numpy as np
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.packing import PackingPlan
from vl3_jax.training.packing_plans import ROWS, load_plan, save_plan

epochs = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=5)


def corpus_with(**planned):
    return types.SimpleNamespace(planned=planned)


def as_rows(lists):
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return PackingPlan(offsets, np.array([sample for row in lists for sample in row], np.int64))


@given(lists=epochs)
def test_they_come_back_as_they_were(lists, tmp_path_factory):
    workdir, rows, again = epath.Path(tmp_path_factory.mktemp("run")), as_rows(lists), corpus_with()
    save_plan(corpus_with(a=rows), workdir)
    load_plan(again, workdir)
    assert list(again.planned) == ["a"]
    found = again.planned["a"]
    assert found.offsets.dtype == found.samples.dtype == np.int64
    assert [found[row].tolist() for row in range(len(found))] == lists


def test_what_is_kept_stays(tmp_path):
    workdir = epath.Path(tmp_path)
    save_plan(corpus_with(a=as_rows([[1]])), workdir)
    (workdir / ROWS / "b.npz.partial").write_bytes(b"what a killed job leaves")
    save_plan(corpus_with(a=as_rows([[2]]), b=as_rows([[3]])), workdir)
    again = corpus_with()
    load_plan(again, workdir)
    assert {key: rows[0].tolist() for key, rows in again.planned.items()} == {"a": [1], "b": [3]}


def test_a_new_run_has_none(tmp_path):
    mixture = corpus_with()
    load_plan(mixture, epath.Path(tmp_path / "new"))
    assert not mixture.planned
