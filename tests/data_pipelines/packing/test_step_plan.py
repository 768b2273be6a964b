"""Tests the assignment of rows to steps: each row once, rows of one length together, in the order of the plan."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.packing.packing_plan import PackingPlan
from data_pipelines.packing.step_plan import StepPlan

LENGTHS = st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=40)


def step_plan(*epochs, rows_per_step, count=None):
    """Returns a plan of rows with these lengths and one sample each, whose number is that of the row."""
    plans = [PackingPlan(np.arange(len(n) + 1), np.arange(len(n)), np.array(n, np.int32)) for n in epochs]
    return StepPlan(plans, rows_per_step, 0, "", count)


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 6))
def test_each_row_once_in_steps_of_one_length(epochs, rows_per_step):
    plan = step_plan(*epochs, rows_per_step=rows_per_step)
    assert len(plan) == sum(-(-len(lengths) // rows_per_step) for lengths in epochs)
    steps = [plan[number] for number in range(len(plan))]
    assert plan.lengths == sorted({step.length for step in steps})
    for epoch, lengths in enumerate(epochs):
        own = [step for step in steps if step.epoch == epoch]
        assert sorted(int(row[0]) for step in own for row in step.rows) == list(range(len(lengths)))
        assert all(len(step.rows) == rows_per_step for step in own[:-1])
        found = [[lengths[int(row[0])] for row in step.rows] for step in own]
        assert [step.length for step in own] == [max(row_lengths) for row_lengths in found]
        assert sum(len(set(row_lengths)) > 1 for row_lengths in found) < len(set(lengths))


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 10))
def test_more_epochs_than_plans_repeat_them(epochs, rows_per_step, count):
    plan = step_plan(*epochs, rows_per_step=rows_per_step, count=count)
    whole = step_plan(*(epochs * count)[:count], rows_per_step=rows_per_step)
    assert (len(plan), plan.lengths[-1]) == (len(whole), max(max(lengths) for lengths in epochs))
    for number in range(len(plan)):
        assert plan[number].epoch == whole[number].epoch
        assert [row.tolist() for row in plan[number].rows] == [row.tolist() for row in whole[number].rows]


def test_rows_of_one_length_stay_in_order():
    plan = step_plan([8] * 7, rows_per_step=3)
    assert [[int(row[0]) for row in plan[step].rows] for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_step_comes_when_its_last_row_does_and_the_rest_joins_the_longer_rows():
    plan = step_plan([8, 32, 8, 8, 32, 8, 32, 8], rows_per_step=2)
    found = [(plan[step].length, [int(row[0]) for row in plan[step].rows]) for step in range(len(plan))]
    assert found == [(8, [0, 2]), (32, [1, 4]), (8, [3, 5]), (32, [6, 7])]
