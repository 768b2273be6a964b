"""Writes synthetic questions to disk.

python -m data_pipelines.synthetic --out DIR --split test --seed 7 --count 200
"""

import argparse
import sys

from tqdm import tqdm

from data_pipelines.synthetic.dataset_writer import write
from data_pipelines.synthetic.image_pool import SPLITS
from data_pipelines.synthetic.registry import JUDGED, TASKS, check_tasks
from vl3_jax.errors import InputError


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder for each task is made in it")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose pictures are shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="samples of each task")
    parser.add_argument("--tasks", metavar="A,B", help=f"default: all that are judged; known: {', '.join(TASKS)}")
    parser.add_argument("--pictures", metavar="NPZ", help="show these (layout: see pictures/README.md)")
    given = parser.parse_args(arguments)
    try:
        tasks = check_tasks(given.tasks.split(",")) if given.tasks else JUDGED
        if given.seed < 0:
            raise InputError(f"seed {given.seed}; give 0 or more")
        with tqdm(total=len(tasks) * max(given.count, 0), unit=" samples", file=sys.stderr) as bar:
            counts = dict.fromkeys(tasks, given.count)
            written = write(
                given.out, given.split, counts, given.seed, given.images, lambda task, done, total: bar.update()
            )
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for task, path in written.items():
        print(f"{task}: {given.count} samples, {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
