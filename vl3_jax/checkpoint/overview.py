"""Lists the content of a checkpoint as a table."""

import numpy as np

from vl3_jax.checkpoint.progress import human_bytes
from vl3_jax.checkpoint.sources import CheckpointSource

_MODULES = {"vision": "vision", "projector": "projector", "llm": "llm", "head": "llm (lm_head)"}


def checkpoint_overview(source: CheckpointSource) -> str:
    """Returns a table of all leaves with shape, dtype, parameters and bytes, and one of the totals."""
    rows = [("leaf", "shape", "dtype", "parameters", "size")]
    totals: dict[str, list[int]] = {}
    for path, spec in source.leaves.items():
        nbytes = spec.size * source.dtypes[path].itemsize
        shape = "x".join(map(str, spec.shape))
        rows.append((path, shape, source.dtypes[path].name, f"{spec.size:,}", human_bytes(nbytes)))
        total = totals.setdefault(_MODULES[spec.part], [0, 0])
        total[0] += spec.size
        total[1] += nbytes
    dtypes = sorted({np.dtype(dtype).name for dtype in source.dtypes.values()})
    summary = [("module", "", "", "parameters", "size")]
    summary += [(name, "", "", f"{size:,}", human_bytes(nbytes)) for name, (size, nbytes) in totals.items()]
    parameters, nbytes = (sum(column) for column in zip(*totals.values(), strict=True))
    summary.append(("total", "", ", ".join(dtypes), f"{parameters:,}", human_bytes(nbytes)))
    tied = "tied" if source.config.text.tie_word_embeddings else "untied"
    title = f"{source.location}: {source.kind} checkpoint"
    if "llm" in source.parts:
        title += f", embeddings {tied}"
    return "\n".join([title, "", *_format_table(rows), "", *_format_table(summary)])


def _format_table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column >= 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
