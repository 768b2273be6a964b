"""Bar charts of benchmark tables: relative rates, case by case."""

import pathlib

from vl3_jax.bench.table import OURS, Table, short
from vl3_jax.errors import InputError

_COLOURS = ("#c8553d", "#8d99ae", "#588b8b", "#f2b134", "#5c4d7d", "#a3b18a")


def check() -> None:
    """Raises an `InputError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("charts need matplotlib: pip install 'vl3_jax[bench]'") from error


def write(table: Table, path: pathlib.Path) -> None:
    """Plots a table into a PNG file: bars are rates relative to ours, labelled with absolute rates."""
    from matplotlib.figure import Figure

    sides = list(dict.fromkeys(row.side for row in table.rows))
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(table.rows)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for index, row in enumerate(table.rows):
        relative = 1 / table.ratio(row)
        axes.barh(index, relative, color=_COLOURS[sides.index(row.side) % len(_COLOURS)])
        axes.text(relative, index, f" {short(row.amount / row.seconds)} {row.unit}/s", va="center", fontsize=8)
        labels.append(f"{row.case}: {row.side}" if row.side == OURS else row.side)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"rate relative to {OURS}")
    axes.margins(x=0.25)
    axes.set_title(f"{table.name}: {table.title}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
