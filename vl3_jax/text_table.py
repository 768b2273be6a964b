"""Tables of text with aligned columns."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Formats rows of cells as lines, with columns as wide as their widest cell and two spaces apart.

    Args:
      rows: The cells of each row, the header among them.
      align: For each column "<" (left) or ">" (right).
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(zip(align, widths, strict=True))
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)).rstrip()
        for row in rows
    ]
