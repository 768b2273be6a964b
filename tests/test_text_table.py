"""Tests tables of text."""

from vl3_jax.text_table import text_table


def test_columns_are_aligned():
    rows = [("name", "count", "", "note"), ("a", "1,000", "", "longer"), ("name of b", "7", "", "")]
    assert text_table(rows, "<><<") == [
        "name       count    note",
        "a          1,000    longer",
        "name of b      7",
    ]
