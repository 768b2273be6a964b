"""Tables of measured times, rendered as text and as JSON."""

import dataclasses
from collections.abc import Mapping
from typing import Any

OURS = "vl3_jax"


def short(value: float) -> str:
    """Formats a number with three significant digits, such as "12,300" or "0.0456"."""
    return f"{float(f'{value:.3g}'):,.12g}"


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
        return {
            "name": self.name,
            "title": self.title,
            "notes": list(self.notes),
            "rows": [_row_as_json(row, self.ratio(row), peak) for row in self.rows],
        }

    def ratio(self, row: Row) -> float:
        """Returns the time that a side takes for the same amount of work, in multiples of ours."""
        ours = next(other for other in self.rows if other.case == row.case and other.side == OURS)
        return (row.seconds / row.amount) / (ours.seconds / ours.amount)

    def rendered(self, peak: float) -> str:
        """Returns the table as text; `peak` is the FLOP/s of the machine."""
        header = ["case", "side", "ms", "rate", "x ours", "of peak", ""]
        lines = [header, *(self._cells(row, peak) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["", f"{self.name}: {self.title}"]
        for index, line in enumerate(lines):
            if index and line[0] == lines[index - 1][0]:
                line = ["", *line[1:]]
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(line[2:6], widths[2:], strict=False)]
            text.append("  ".join(["", *left, *right, line[6]]).rstrip())
        return "\n".join([*text, *(f"  {note}" for note in self.notes)])

    def _cells(self, row: Row, peak: float) -> list[str]:
        of_peak = f"{row.flops / row.seconds / peak:.0%}" if row.flops else ""
        figures = ", ".join(f"{name} {short(value)}" for name, value in row.figures.items())
        rate = f"{short(row.amount / row.seconds)} {row.unit}/s"
        return [row.case, row.side, short(row.seconds * 1e3), rate, f"{self.ratio(row):.2f}", of_peak, figures]


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
