"""What is in a checkpoint, as a table."""

import numpy as np

from vl3_jax.checkpoint.progress import human_bytes
from vl3_jax.checkpoint.sources import CheckpointSource

_MODULES = {"vision": "vision", "projector": "projector", "llm": "llm", "head": "llm (lm_head)"}


def describe(source: CheckpointSource) -> str:
    """Leaves with shape, dtype, parameters and bytes; then the totals of each module and of all."""
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
    everything = [sum(column) for column in zip(*totals.values(), strict=True)]
    summary.append(("total", "", ", ".join(dtypes), f"{everything[0]:,}", human_bytes(everything[1])))
    tied = "tied" if source.config.text.tie_word_embeddings else "untied"
    head = f"{source.location}: {source.kind} checkpoint"
    if "llm" in source.parts:
        head += f", embeddings {tied}"
    return "\n".join([head, "", *_table(rows), "", *_table(summary)])


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column >= 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
