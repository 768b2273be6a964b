"""Tables of results beside all columns of the paper's tables, as Markdown and HTML."""

import functools
import html
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vl3_jax.evaluation.benchmark import CONSTANT, OVERALL, mean
from vl3_jax.text_table import text_table

MARKDOWN, HTML = "results.md", "results.html"
_MARKUP = re.compile(r"[|*]")  # characters that Markdown would take for its own
_MARKS = {"reproduced": "*", "leaderboard": "†"}
_NOTES = "* measured by the paper's authors, † taken from a leaderboard; as the paper states."
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#222;background:#fff}
table{border-collapse:collapse}
th,td{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}th:first-child,td:first-child{text-align:left}
td:last-child,th:last-child{font-weight:bold;background:#eef4ff}"""

Table = tuple[str, list[list[str]]]


@functools.cache
def paper_tables() -> Mapping[str, Any]:
    """Returns the paper's tables: for each its title, its models and the values of its rows."""
    return json.loads(pathlib.Path(__file__).with_name("paper_tables.json").read_text(encoding="utf-8"))["tables"]


def tables(content: Mapping[str, Any], model: str = "this model") -> list[Table]:
    """Returns the paper's tables that the results have rows of, the synthetic tasks, and everything else measured.

    Args:
      content: Content of `results.json`.
      model: Name of the last column.

    Returns:
      Title and rows of each table, the header first.
    """
    cells = {name: cell for summary in content["tasks"].values() for name, cell in _headline(summary)}
    found = []
    for number, table in paper_tables().items():
        shown = [(name, values) for name, values in table["rows"].items() if name in cells]
        rows = [[name, *map(_cell, values), cells[name]] for name, values in shown]
        if rows:
            found.append((f"Table {number}: {table['title']}", [["", *table["models"], model], *rows]))
    synthetic = {task: item for task, item in content["tasks"].items() if CONSTANT in item["metrics"]}
    if synthetic:
        found.append(("Synthetic tasks", [_SYNTHETIC, *_synthetic(synthetic)]))
    others = [(task, item) for task, item in content["tasks"].items() if task not in synthetic]
    if others:
        found.append(("All values", [_HEADER, *(row for item in others for row in _summary(*item))]))
    return found


def markdown(content: Mapping[str, Any], model: str = "this model") -> str:
    """Returns the tables and what they rest on as Markdown."""
    parts = ["# Results"]
    for title, (header, *rows) in tables(content, model):
        lines = ["| " + " | ".join(_MARKUP.sub(r"\\\g<0>", cell) for cell in row) + " |" for row in [header, *rows]]
        lines.insert(1, "| --- |" + " ---: |" * (len(header) - 1))
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join([*parts, f"\\{_NOTES}", *_remarks(content)]) + "\n"


def as_text(content: Mapping[str, Any], model: str = "this model") -> str:
    """Returns the tables as text with aligned columns."""
    found = tables(content, model)
    return "\n\n".join("\n".join([title, *text_table(rows, "<" + ">" * (len(rows[0]) - 1))]) for title, rows in found)


def as_html(content: Mapping[str, Any], model: str = "this model") -> str:
    """Returns the tables and what they rest on as an HTML page."""
    parts = ["<h1>Results</h1>"]
    for title, (header, *rows) in tables(content, model):
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
        heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        parts.append(f"<h2>{html.escape(title)}</h2>\n<table>\n<tr>{heads}</tr>\n{cells}</table>")
    parts += [f"<p>{html.escape(remark)}</p>" for remark in [_NOTES, *_remarks(content)]]
    return page("Results", "\n".join(parts), _STYLE)


def page(title: str, body: str, style: str) -> str:
    """Returns an HTML page."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _headline(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields name and cell of each row of the paper; the cell names the split if the row is that of another one."""
    for name, value in summary["headline"].items():
        other = name.endswith(" test") and summary["split"] != "test"
        yield name, _number(value) + (f" ({summary['split']})" if other else "")


_HEADER = ["benchmark", "metric", "value", "official form", "answers", "unparsed", "errors", "without media", "missing"]


_SYNTHETIC = ["task", "score", CONSTANT, "answers", "kept", "other values"]


def _synthetic(tasks: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields the row of each synthetic task, and one of their means."""
    for task, summary in tasks.items():
        metrics, kept = summary["metrics"], summary["kept"]
        others = [f"{name} {_number(value)}" for name, value in metrics.items() if name not in (OVERALL, CONSTANT)]
        figures = [_number(metrics[name]) for name in (OVERALL, CONSTANT)]
        yield [task, *figures, str(summary["n"]), "" if kept is None else f"{kept:.0%}", ", ".join(others)]
    means = [mean([summary["metrics"][name] for summary in tasks.values()]) for name in (OVERALL, CONSTANT)]
    yield ["mean", *map(_number, means), f"{len(tasks)} tasks", "", ""]


def _summary(task: str, summary: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yields a row for each number of the metrics and details."""
    counts = [str(summary[name]) for name in ("n", "n_unparsed", "n_error", "n_missing_media", "n_missing")]
    official = dict(_flat(summary["variants"].get("official", {})))
    for name, value in _flat(summary["metrics"]):
        yield [task, name, _number(value), _number(official.get(name)), *counts]
    for name, value in _flat(summary["details"]):
        yield [task, name, _number(value), "", *counts]
    for variant, metrics in summary["variants"].items():
        if variant != "official":
            yield from ([task, f"{name} ({variant})", _number(value), "", *counts] for name, value in _flat(metrics))


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | None]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} / ")
        else:
            yield f"{prefix}{name}", value


def _remarks(content: Mapping[str, Any]) -> Sequence[str]:
    """Returns what a reader must know to compare the values."""
    remarks = []
    for task, summary in content["tasks"].items():
        remark = f"{task}: split {summary['split']}, {summary['scoring']} scoring, judge: {summary['judge']}"
        if summary["n_usual"] and summary["n"] + summary["n_unscored"] != summary["n_usual"]:
            remark += f"; {summary['n'] + summary['n_unscored']} answers where the benchmark has {summary['n_usual']}"
        if summary["n_unscored"]:
            remark += f"; {summary['n_unscored']} answers have a hidden reference and are not scored here"
        remarks.append(remark + ".")
    protocol = content.get("protocol")
    if protocol:
        remarks.append("Asked with " + ", ".join(f"{name} {value}" for name, value in protocol.items()) + ".")
    return remarks


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{_number(value[0])}{_MARKS[value[1]]}"
    return _number(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 200 else f"{value:.1f}"
