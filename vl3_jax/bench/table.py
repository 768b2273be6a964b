"""Tables of measured times, rendered as text, as JSON and as bar charts."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from vl3_jax.text_table import text_table

# Sides that several subjects have.
OURS, SEPARATE_ROWS, REFERENCE = "vl3_jax", "separate rows", "transformers"
_COLOURS = ("#c8553d", "#8d99ae", "#588b8b", "#f2b134", "#5c4d7d", "#a3b18a")


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurement of one side of a case.

    Attributes:
      case: The work that is measured; rows of the same case do the same work.
      side: The implementation: `OURS`, a plain one, or transformers.
      seconds: Median time of a run.
      amount: Work that a run does, in `unit`s.
      unit: Unit of the work, such as "frames".
      flops: Useful arithmetic of a run; None if it is not counted.
      figures: Other measured numbers by name, such as "temporaries MB".
    """

    case: str
    side: str
    seconds: float
    amount: float
    unit: str
    flops: float | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.amount / self.seconds

    def share_of_peak(self, peak: float) -> float | None:
        """Returns the useful FLOP/s relative to `peak`; None if arithmetic is not counted."""
        return self.flops / self.seconds / peak if self.flops else None


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one subject.

    Attributes:
      name: The subject's name on the command line.
      title: One line that describes the table.
      rows: The measurements, `OURS` first in each case.
      notes: Remarks, one line each.
    """

    name: str
    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def as_json(self, peak: float) -> dict[str, Any]:
        """Returns the table as plain values; `peak` is the FLOP/s of the machine."""
        rows = [
            {name: value for name, value in vars(row).items() if name != "amount"}
            | {"rate": row.rate, "unit": f"{row.unit}/s"}
            | {"times_ours": self.ratio(row), "share_of_peak": row.share_of_peak(peak)}
            for row in self.rows
        ]
        return {"name": self.name, "title": self.title, "notes": self.notes, "rows": rows}

    def ratio(self, row: Row) -> float:
        """Returns the time that a side takes for the same amount of work, in multiples of ours."""
        ours = next(other for other in self.rows if other.case == row.case and other.side == OURS)
        return ours.rate / row.rate

    def rendered(self, peak: float) -> str:
        """Returns the table as text; `peak` is the FLOP/s of the machine."""
        lines = [("case", "side", "ms", "rate", "x ours", "of peak", "")]
        for previous, row in zip([None, *self.rows], self.rows, strict=False):
            case = "" if previous and previous.case == row.case else row.case
            share = row.share_of_peak(peak)
            percent = "" if share is None else f"{share:.0%}"
            figures = ", ".join(f"{name} {_short(value)}" for name, value in row.figures.items())
            times = (_short(row.seconds * 1e3), _rate(row), f"{self.ratio(row):.2f}")
            lines.append((case, row.side, *times, percent, figures))
        indented = (f"  {line}" for line in (*text_table(lines, "<<>>>><"), *self.notes))
        return "\n".join(["", f"{self.name}: {self.title}", *indented])

    def write_chart(self, path: pathlib.Path) -> None:
        """Plots the table into a PNG file: bars are rates relative to ours, labelled with absolute rates."""
        from matplotlib.figure import Figure

        sides = list(dict.fromkeys(row.side for row in self.rows))
        figure = Figure(figsize=(9, 1.2 + 0.32 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        colours = [_COLOURS[sides.index(row.side) % len(_COLOURS)] for row in self.rows]
        bars = axes.barh(range(len(self.rows)), [1 / self.ratio(row) for row in self.rows], color=colours)
        axes.bar_label(bars, [_rate(row) for row in self.rows], padding=3, fontsize=8)
        labels = [f"{row.case}: {row.side}" if row.side == OURS else row.side for row in self.rows]
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"rate relative to {OURS}")
        axes.margins(x=0.25)
        axes.set_title(f"{self.name}: {self.title}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120)


def _short(value: float) -> str:
    """Formats a number with three significant digits, such as "12,300" or "0.0456"."""
    return f"{float(f'{value:.3g}'):,.12g}"


def _rate(row: Row) -> str:
    return f"{_short(row.rate)} {row.unit}/s"
