"""The scores of nano in docs/nano.md and README.md, measured anew: python docs/generate_nano.py --out DIR.

DIR gets three runs of `vl3 eval --tasks nano`: as it is, with the media of other questions, and with every video token;
an interrupted one is resumed. What only a training can tell (stages, another seed) stays as it is in results.json.
"""

import argparse
import json
import pathlib
import sys

from vl3_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[1]
RUNS = {"score": [], "blind": ["--blind"], "unpruned": ["--no-prune"]}  # by the name in results.json
sys.path.insert(0, str(ROOT / "launch" / "nano"))

import report  # noqa: E402


def generate(out: pathlib.Path, root: pathlib.Path = ROOT) -> int:
    """Runs the evaluations and writes results.json and the tables; returns the exit code of the first that fails."""
    file = root / "docs" / report.FIGURES / report.RESULTS
    results = json.loads(file.read_text(encoding="utf-8"))
    tasks = results["tasks"]
    for name, flags in RUNS.items():
        asked = [task for task, values in tasks.items() if name in values]
        code = main(["eval", "--model", "nano", "--tasks", ",".join(asked), *flags, "--out", str(out / name)])
        if code:
            return code
        for task, values in report.scores(out / name).items():
            tasks[task] |= values if name == "score" else {name: values["score"]}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for page in (root / "README.md", root / "docs" / "nano.md"):
        report.fill(page, {"accuracy": report.accuracy(tasks), "checks": report.checks(tasks)})
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of the runs")
    sys.exit(generate(parser.parse_args().out))
