"""Ref-YTVOS and Ref-DAVIS17: expressions whose masks are pictures, one a frame, in which a colour is an object."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import OVERALL, PaperRow
from vl3_jax.evaluation.benchmarks.referring_videos import ReferringVideos, VideoExpression, frame_files
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.processing.mask_files import encode_rle

_EXPRESSIONS = "meta_expressions"


class RefYTVOS(ReferringVideos):
    """Expressions for objects of YouTube-VOS.

    The masks of `valid` are with the server, and so its videos are scored there, unless a folder of annotations and
    the `obj_id` of the expressions have been added. Its file of expressions has those of `test`, too, which are left
    out.
    """

    name, title, size, submission, archive = "ref_ytvos", "Ref-YTVOS", 834, True, "Annotations"
    rows = (PaperRow("Ref-YTVOS", (OVERALL,)),)
    splits = ("valid", "train")
    source = "youtube-vos.org/dataset/rvos (Refer-YouTube-VOS)"
    layout = (
        "meta_expressions/{split}/meta_expressions.json\n{split}/JPEGImages/{video}/{frame}.jpg\n"
        "meta_expressions/test/meta_expressions.json, for `valid`\ntrain/Annotations/{video}/{frame}.png"
    )
    licence = "annotations: CC BY 4.0; videos: the terms of YouTube"

    def expressions(self, data: DataFolder) -> Iterator[VideoExpression]:
        for video, entry in self.videos(data).items():
            frames, entries = entry["frames"], entry["expressions"]
            files = frame_files(data, video, frames, self.split)
            pictures = [data.path(self.split, "Annotations", video, f"{frame}.png") for frame in frames]
            known = data.exists(self.split, "Annotations", video) and all("obj_id" in each for each in entries.values())
            hidden = self.submission and self.split == "valid" and not known
            numbers = [] if hidden else sorted({int(expression["obj_id"]) for expression in entries.values()})
            masks = _masks_by_number(pictures, numbers)
            for name, expression in entries.items():
                target = None if hidden else [[mask] for mask in masks[int(expression["obj_id"])]]
                yield VideoExpression(video, name, files, expression["exp"], target)

    def videos(self, data: DataFolder) -> Mapping[str, Any]:
        """Returns the entries of the split by the name of their video."""
        found = data.json(_EXPRESSIONS, self.split, "meta_expressions.json")["videos"]
        test = (_EXPRESSIONS, "test", "meta_expressions.json")
        others = data.json(*test)["videos"] if self.split == "valid" and data.exists(*test) else {}
        return {video: entry for video, entry in found.items() if video not in others}


class RefDAVIS17(RefYTVOS):
    """Four expressions for each object of DAVIS 2017, in the layout of Ref-YTVOS."""

    name, title, size, submission, splits = "ref_davis17", "Ref-DAVIS17", 244, False, ("valid",)
    rows = (PaperRow("Ref-DAVIS17", (OVERALL,)),)
    source = (
        "github.com/wjn922/ReferFormer (tools/data/convert_davis_to_ytvos.py); videos of davischallenge.org at 480p, "
        "expressions of mpi-inf.mpg.de"
    )
    layout = (
        "meta_expressions/valid/meta_expressions.json\nvalid/JPEGImages/{video}/{frame}.jpg\n"
        "valid/Annotations/{video}/{frame}.png"
    )
    licence = "DAVIS: CC BY-NC 4.0"


def _masks_by_number(pictures: Sequence[str], numbers: Iterable[int]) -> dict[int, list[dict[str, Any]]]:
    """Returns the run lengths of objects in each picture, by the number of their colour."""
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    for path in pictures if found else ():
        try:
            with Image.open(path) as image:
                colours = np.asarray(image)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error}); download it again") from None
        if colours.ndim != 2:
            raise InputError(f"{path}: has mode {image.mode}, expected a picture whose colours are numbers (P or L)")
        for number, masks in found.items():
            masks.append(encode_rle(colours == number))
    return found
