"""A benchmark's result: rows of measured times, printed, drawn and written as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

OURS = "vl3_jax"


def short(value: float) -> str:
    """Three digits that count, such as "12,300" and "0.0456"."""
    return f"{float(f'{value:.3g}'):,.12g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
      case: what was done; rows of the same case did the same.
      side: who did it: `OURS`, a plain form, or transformers.
      seconds: median of a run.
      amount, unit: what a run gets done, such as 64 and "frames".
      flops: useful arithmetic of a run; None where it is not counted.
      figures: other measured numbers by name, such as "temporaries MB".
    """

    case: str
    side: str
    seconds: float
    amount: float
    unit: str
    flops: float | None = None
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one subject.

    Attributes:
      name: as on the command line.
      title: one line.
      rows: `OURS` first in each case.
      notes: lines to be read with it.
    """

    name: str
    title: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def as_json(self, peak: float) -> dict[str, Any]:
        """For the file. `peak`: FLOP/s of the machine."""
        return {
            "name": self.name,
            "title": self.title,
            "notes": list(self.notes),
            "rows": [_row_as_json(row, self.ratio(row), peak) for row in self.rows],
        }

    def ratio(self, row: Row) -> float:
        """How many times as long as ours this side takes for the same amount."""
        ours = next(one for one in self.rows if one.case == row.case and one.side == OURS)
        return (row.seconds / row.amount) / (ours.seconds / ours.amount)

    def rendered(self, peak: float) -> str:
        """For the terminal."""
        heads = ["case", "side", "ms", "rate", "x ours", "of peak", ""]
        lines = [heads, *(self._cells(row, peak) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["", f"{self.name}: {self.title}"]
        for number, line in enumerate(lines):
            if number and line[0] == lines[number - 1][0]:
                line = ["", *line[1:]]
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(line[2:6], widths[2:], strict=False)]
            text.append("  ".join(["", *left, *right, line[6]]).rstrip())
        return "\n".join([*text, *(f"  {note}" for note in self.notes)])

    def _cells(self, row: Row, peak: float) -> list[str]:
        used = f"{row.flops / row.seconds / peak:.0%}" if row.flops else ""
        figures = ", ".join(f"{name} {short(value)}" for name, value in row.figures.items())
        rate = f"{short(row.amount / row.seconds)} {row.unit}/s"
        return [row.case, row.side, short(row.seconds * 1e3), rate, f"{self.ratio(row):.2f}", used, figures]


def _row_as_json(row: Row, ratio: float, peak: float) -> dict[str, Any]:
    return {
        "case": row.case,
        "side": row.side,
        "seconds": row.seconds,
        "rate": row.amount / row.seconds,
        "unit": f"{row.unit}/s",
        "times_ours": ratio,
        "flops": row.flops,
        "share_of_peak": row.flops / row.seconds / peak if row.flops else None,
        "figures": dict(row.figures),
    }
