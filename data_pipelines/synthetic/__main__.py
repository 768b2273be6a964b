"""Writes synthetic data sets to disk.

python -m data_pipelines.synthetic --out DIR --split test --seed 7 --count 200
"""

import argparse
import sys

from tqdm import tqdm

from data_pipelines.synthetic.dataset_writer import write
from data_pipelines.synthetic.image_pool import SPLITS
from data_pipelines.synthetic.registry import EVALUATED_TASKS, TASKS, check_tasks
from vl3_jax.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 for success, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; each task gets a subfolder")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of the source images (default: test)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the data set (default: 0)")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="samples per task (default: 200)")
    parser.add_argument("--tasks", metavar="A,B", help=f"default: all evaluated tasks; known: {', '.join(TASKS)}")
    parser.add_argument("--images", metavar="NPZ", help="use these source images (layout: see images/README.md)")
    arguments = parser.parse_args(argv)
    try:
        tasks = check_tasks(arguments.tasks.split(",")) if arguments.tasks else EVALUATED_TASKS
        if arguments.seed < 0:
            raise InputError(f"seed {arguments.seed}; give 0 or more")
        counts = dict.fromkeys(tasks, arguments.count)
        with tqdm(total=len(tasks) * max(arguments.count, 0), unit=" samples", file=sys.stderr) as bar:
            written = write(arguments.out, arguments.split, counts, arguments.seed, arguments.images, bar.update)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for task, path in written.items():
        print(f"{task}: {arguments.count} samples, {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
