"""MeViS, ReVOS and Ref-SAV: expressions whose masks stand in one table, `mask_dict.json`, by number and frame."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import OVERALL, PaperRow
from vl3_jax.evaluation.benchmarks.referring_videos import ReferringVideos, VideoExpression, frame_files
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.mask_answers import RunLengths
from vl3_jax.evaluation.scorers.mask_overlap import pixel_accuracy, robustness

_MASKS = "mask_dict.json"


class _MaskTable(ReferringVideos):
    """Expressions that name their masks by `anno_id` and their group by `type_id`.

    Attributes:
      annotations: Name of the file of expressions.
      groups: Names of the groups by their number.
    """

    annotations: ClassVar[str] = "meta_expressions.json"
    groups: ClassVar[Mapping[int, str]] = {}

    def folder(self) -> tuple[str, ...]:
        """Returns the folder of the split, from that of the benchmark."""
        return ()

    def expressions(self, data: DataFolder) -> Iterator[VideoExpression]:
        masks = self.masks(data)
        for video, entry in data.json(*self.folder(), self.annotations)["videos"].items():
            frames = frame_files(data, video, entry["frames"], *self.folder())
            for name, expression in entry["expressions"].items():
                objects = [] if masks is None else [masks[str(number)] for number in expression["anno_id"]]
                if any(len(by_frame) != len(frames) for by_frame in objects):
                    raise InputError(
                        f"{data.path(*self.folder(), _MASKS)}: expression {name} of video {video} has masks of other "
                        f"than its {len(frames)} frames; download it again"
                    )
                target = None if masks is None else [[each[index] for each in objects] for index in range(len(frames))]
                group = self.groups.get(expression["type_id"]) if self.groups else None
                yield VideoExpression(video, name, frames, expression["exp"], target, group)

    def masks(self, data: DataFolder) -> Mapping[str, Sequence[RunLengths]] | None:
        """Returns the masks by their number and frame; None where they are not published."""
        return data.json(*self.folder(), _MASKS)


class MeViS(_MaskTable):
    """Expressions about motion, each of one object or several, or of none."""

    name, title, size, submission = "mevis", "MeViS", 793, True
    rows = (PaperRow("MeViS", (OVERALL,)),)
    splits = ("valid_u", "valid")
    source = "github.com/henghuiding/MeViS"
    layout = (
        "{split}/meta_expressions.json\n{split}/JPEGImages/{video}/{frame}.jpg\n"
        "valid_u/mask_dict.json; those of `valid` are with the server, codabench.org/competitions/11420"
    )
    licence = "CC BY-NC-SA 4.0"

    def folder(self):
        return (self.split,)

    def masks(self, data):
        return super().masks(data) if self.split == "valid_u" else None


class ReVOS(_MaskTable):
    """Expressions that name an object, and those that take reasoning; the score is the mean of both groups.

    Beside J and F there are A, the share of right pixels, and R, the robustness: 1 less the share of what is drawn
    wrongly, as a multiple of all objects that any expression of the video names.
    """

    name, title, size, splits = "revos", "ReVOS", 0, ("valid",)
    rows = (PaperRow("ReVOS", (OVERALL,)),)
    measures = ("J", "F", "A", "R")
    source = "github.com/cilinyan/ReVOS-api"
    layout = (
        "meta_expressions_valid_.json\nmask_dict.json\nmask_dict_foreground.json\n{video}/{frame}.jpg, or the same "
        "in JPEGImages"
    )
    licence = "CC BY-NC-SA 4.0"
    annotations = "meta_expressions_valid_.json"
    groups: ClassVar[Mapping[int, str]] = {0: "referring", 1: "reasoning"}

    def expressions(self, data):
        foreground = data.json("mask_dict_foreground.json")
        for each in super().expressions(data):
            masks = [[mask] for mask in foreground[each.video]["masks_rle"]]
            if len(masks) != len(each.frames):
                raise InputError(
                    f"{data.path('mask_dict_foreground.json')}: video {each.video} has masks of other than its "
                    f"{len(each.frames)} frames; download it again"
                )
            yield each._replace(others={"foreground": masks})

    def sides(self, reference: Mapping[str, Any]):
        return [reference["target"], reference["foreground"]]

    def compare(self, drawn: np.ndarray, target: np.ndarray, foreground: np.ndarray) -> dict[str, float]:
        others = {"A": pixel_accuracy(drawn, target), "R": robustness(drawn, target, foreground)}
        return super().compare(drawn, target) | others


class RefSAV(_MaskTable):
    """Long and short descriptions of objects of SA-V; the score is the mean of both groups."""

    name, title, size, splits = "ref_sav", "Ref-SAV", 1945, ("valid",)
    rows = (PaperRow("Ref-SAV", (OVERALL,)),)
    source = "huggingface.co/datasets/Dense-World/Sa2VA-Eval (ref_sav_eval); videos of SA-V as frames"
    layout = "meta_expressions_valid.json\nmask_dict.json\nvideos/{video}/{frame}.jpg"
    licence = "SA-V: CC BY 4.0"
    annotations = "meta_expressions_valid.json"
    groups: ClassVar[Mapping[int, str]] = {0: "long", 1: "short"}
