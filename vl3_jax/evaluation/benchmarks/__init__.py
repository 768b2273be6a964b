"""The benchmarks by name: those of the paper's tables 5 to 8, of masks, and the synthetic tasks of nano.

find(["videomme", "BLINK@test"])         two benchmarks, the second with another split than its default
find(["nano/digit"])                     a synthetic task; find(["nano"]) are all of them
"""

import importlib
import runpy
from collections.abc import Iterable

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark
from vl3_jax.evaluation.benchmarks.synthetic import FAMILY, SYNTHETIC, QuestionSelection

# Name on the command line, module of this package and class.
IMAGE_BENCHMARKS = {
    "ChartQA": "chartqa:ChartQA",
    "DocVQA": "docvqa:DocVQA",
    "InfoVQA": "infovqa:InfoVQA",
    "OCRBench": "ocrbench:OCRBench",
    "MathVista": "mathvista:MathVista",
    "MathVision": "mathvision:MathVision",
    "MMMU_Pro": "mmmu_pro:MMMUPro",
    "MMMU": "mmmu:MMMU",
    "BLINK": "blink:BLINK",
    "RealWorldQA": "realworldqa:RealWorldQA",
    "AI2D": "ai2d:AI2D",
    "GQA": "gqa:GQA",
    "MME": "mme:MME",
}
VIDEO_BENCHMARKS = {
    "videomme": "videomme:VideoMME",
    "mmvu": "mmvu:MMVU",
    "mvbench": "mvbench:MVBench",
    "egoschema": "egoschema:EgoSchema",
    "perception_test": "perception_test:PerceptionTest",
    "activitynet_qa": "activitynet_qa:ActivityNetQA",
    "mlvu": "mlvu:MLVU",
    "longvideobench": "longvideobench:LongVideoBench",
    "lvbench": "lvbench:LVBench",
    "tempcompass": "tempcompass:TempCompass",
    "nextqa": "nextqa:NextQA",
    "charades_sta": "charades_sta:CharadesSTA",
}
BENCHMARKS = {**IMAGE_BENCHMARKS, **VIDEO_BENCHMARKS}
# Of masks in answers or in questions, which only a Sa2VA takes.
MASK_BENCHMARKS = {
    "refcoco": "referring_images:RefCOCO",
    "refcoco+": "referring_images:RefCOCOPlus",
    "refcocog": "referring_images:RefCOCOg",
    "mevis": "mevis:MeViS",
    "ref_ytvos": "ref_ytvos:RefYTVOS",
    "ref_davis17": "ref_ytvos:RefDAVIS17",
    "revos": "mevis:ReVOS",
    "ref_sav": "mevis:RefSAV",
    "gcg": "gcg:GroundedCaptions",
    "region_captions": "region_captions:RegionCaptions",
}
_GROUPS = {
    "images": IMAGE_BENCHMARKS,
    "videos": VIDEO_BENCHMARKS,
    "paper": BENCHMARKS,
    "masks": MASK_BENCHMARKS,
    FAMILY: SYNTHETIC,
}
_registered: dict[str, type[Benchmark]] = {}


def register(benchmark: type[Benchmark]) -> type[Benchmark]:
    """Adds a benchmark that is defined elsewhere under its name; a decorator of its class."""
    _registered[benchmark.name] = benchmark
    return benchmark


def names() -> list[str]:
    """Returns the names of all benchmarks."""
    return [*BENCHMARKS, *MASK_BENCHMARKS, *_registered]


def listed(tasks: str) -> list[str]:
    """Returns the names of a list with commas."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


def find(tasks: Iterable[str], selection: QuestionSelection | None = None) -> list[Benchmark]:
    """Returns the benchmarks of these names, in their order and without duplicates.

    Args:
      tasks: Names, each with `@` and a split if it is not the default one; "images", "videos", "paper", "masks" and
        "nano" are groups; a Python file stands for the benchmarks that it defines.
      selection: Questions of the synthetic tasks; the default ones if None.

    Raises:
      InputError: A name or split is unknown, or a file cannot be used.
    """
    found: dict[str, Benchmark] = {}
    for task in tasks:
        for name in _from_file(task) if task.endswith(".py") else _GROUPS.get(task, [task]):
            benchmark = SYNTHETIC[name](selection) if name in SYNTHETIC else _open(name)
            found.setdefault(benchmark.task, benchmark)
    return list(found.values())


def _from_file(path: str) -> list[str]:
    """Runs a Python file, registers the benchmarks that it defines, and returns their names."""
    try:
        defined = runpy.run_path(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a Python file that defines a benchmark") from None
    except Exception as error:  # whatever the file does
        raise InputError(f"{path}: cannot be run ({error!r}); correct it") from error
    classes = [value for value in defined.values() if isinstance(value, type) and issubclass(value, Benchmark)]
    own = [value for value in classes if value.__module__ == defined["__name__"]]
    if not own:
        raise InputError(f"{path}: defines no subclass of vl3_jax.evaluation.benchmark.Benchmark; add one")
    return [register(cls).name for cls in own]


def _open(task: str) -> Benchmark:
    written, _, split = task.partition("@")
    name = next((name for name in names() if name.lower() == written.lower()), None)
    if name in _registered:
        return _registered[name](split or None)
    if name is None:
        raise InputError(f"task {task!r} is unknown; use {', '.join([*_GROUPS, *names(), *SYNTHETIC])}")
    module, cls = (BENCHMARKS | MASK_BENCHMARKS)[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)(split or None)
