"""Counts the statement lines of the code outside tests: python tests/support/count_statements.py [FOLDER ...].

A statement line holds code other than an import; docstrings, comments, blank lines and imports do not count.
"""

import ast
import pathlib
import sys
import tokenize

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("vl3_jax", "data_pipelines", "configs", "launch", "docs")
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def statement_lines(path: pathlib.Path) -> int:
    """Returns the number of statement lines of a Python file."""
    with tokenize.open(path) as file:
        tree = ast.parse(file.read())
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in _LAYOUT]
    lines = {line for token in tokens[1:] for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree):
        is_docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if isinstance(node, ast.Import | ast.ImportFrom) or is_docstring:
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def main(folders: list[str]) -> None:
    """Prints the count of each folder and of all."""
    counts = {
        folder: sum(statement_lines(path) for path in sorted((ROOT / folder).rglob("*.py")))
        for folder in folders or FOLDERS
    }
    for folder, count in counts.items():
        print(f"{count:7,}  {folder}")
    print(f"{sum(counts.values()):7,}  in all")


if __name__ == "__main__":
    main(sys.argv[1:])
