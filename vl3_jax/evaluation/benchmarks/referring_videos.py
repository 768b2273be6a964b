"""MeViS, ReVOS, Ref-SAV and Ref-DAVIS17: the masks of what an expression names, in all frames of a video."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import (
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    ScoredAnswer,
    Scoring,
    Verdict,
    grouped,
    mean,
)
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.drawn_answers import union
from vl3_jax.evaluation.scorers.boundary import video_similarity
from vl3_jax.inference.mask_drawer import choose_key_frames
from vl3_jax.processing.mask_files import encode_rle
from vl3_jax.sa2va.templates import video_expression

Masks = Sequence[Mapping[str, Any] | None]  # of one object, by frame


class ReferringVideos(Benchmark):
    """J, F and J&F: means over the frames of an expression, then over expressions.

    The model sees the first five frames.
    """

    kind, draws = "video", True
    rows = (PaperRow("J&F", (OVERALL,)),)
    max_new_tokens = 512
    groups: ClassVar[Mapping[int, str]] = {}  # by the `type_id` of an expression

    def expressions(self, data: DataFolder) -> Iterator[tuple[str, list[str], str, dict[str, Any], list[Masks]]]:
        """Yields name of the video, its frames, name of the expression, its entry, and the masks of its objects."""
        raise NotImplementedError

    def items(self, data: DataFolder) -> list[Item]:
        items = []
        for video, frames, name, expression, masks in self.expressions(data):
            seen = choose_key_frames(len(frames), None, "sa2va")
            media = [{"type": "image", "image": frames[index]} for index in seen]
            group = self.groups.get(expression["type_id"]) if self.groups else None
            target = [[each[index] for each in masks] for index in range(len(frames))]
            reference = {"target": target, "task_type": group}
            text = video_expression(expression["exp"])
            items.append(Item(f"{video}/{name}", media, text, reference, frames=frames))
        return items

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        pairs = list(zip(response["masks"], reference["target"], strict=True))
        sizes = [mask["size"] for frame in pairs for side in frame for mask in side if mask is not None]
        size = sizes[0] if sizes else (1, 1)
        values = video_similarity((union(drawn, size), union(wanted, size)) for drawn, wanted in pairs)
        drawn = any(response["masks"])
        return Verdict(values.both, {"J": values.region, "F": values.boundary}, None if drawn else "no mask")

    def metrics(self, answers):
        found = {name: _means(group) for name, group in grouped(answers, "task_type").items()}
        whole = found.values() if found else [_means(answers)]
        overall = {name: mean([values[name] for values in whole]) for name in ("J", "F", "J&F")}
        return {**found, "J": overall["J"], "F": overall["F"], OVERALL: overall["J&F"]}

    def details(self, answers):
        return {}


class MeViS(ReferringVideos):
    """Expressions about motion, each of one object or several; the split whose masks are published."""

    name, title, size, splits = "mevis", "MeViS", 793, ("valid_u",)
    source = "henghuiding.github.io/MeViS"
    layout = "valid_u/meta_expressions.json\nvalid_u/mask_dict.json\nvalid_u/JPEGImages/{video}/{frame}.jpg"
    licence = "CC BY-NC-SA 4.0"
    folder: ClassVar[tuple[str, ...]] = ("valid_u",)
    metadata: ClassVar[str] = "meta_expressions.json"

    def expressions(self, data):
        masks = data.json(*self.folder, "mask_dict.json")
        for video, entry in data.json(*self.folder, self.metadata)["videos"].items():
            inside = ("JPEGImages",) if data.exists(*self.folder, "JPEGImages") else ()
            frames = [data.path(*self.folder, *inside, video, f"{frame}.jpg") for frame in entry["frames"]]
            for name, expression in entry["expressions"].items():
                yield video, frames, name, expression, [masks[str(number)] for number in expression["anno_id"]]


class ReVOS(MeViS):
    """Expressions that name an object, and those that take reasoning; the score is the mean of both groups.

    Besides J and F there is R, the robustness: 1 less the share of what is drawn wrongly, as a multiple of all objects
    that any expression of the video names.
    """

    name, title, size, splits = "revos", "ReVOS", 0, ("valid",)
    source = "github.com/cilinyan/ReVOS-api"
    layout = (
        "meta_expressions_valid_.json\nmask_dict.json\nmask_dict_foreground.json\n{video}/{frame}.jpg, or the same "
        "in JPEGImages"
    )
    licence = "CC BY-NC-SA 4.0"
    folder, metadata = (), "meta_expressions_valid_.json"
    groups: ClassVar[Mapping[int, str]] = {0: "referring", 1: "reasoning"}

    def items(self, data):
        foreground = data.json("mask_dict_foreground.json")
        found = super().items(data)
        for item in found:
            video = item.id.rpartition("/")[0]
            item.reference["foreground"] = foreground[video]["masks_rle"]
        return found

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        found = super().verdict(response, reference, scoring)
        shares = []
        for drawn, wanted, others in zip(response["masks"], reference["target"], reference["foreground"], strict=True):
            size = others["size"]
            wrong = np.count_nonzero(union(drawn, size) & ~union(wanted, size))
            shares.append(max(0.0, 1 - wrong / (np.count_nonzero(union([others], size)) + 1e-6)))
        return dataclasses.replace(found, parsed={**found.parsed, "R": mean(shares)})

    def metrics(self, answers):
        found = super().metrics(answers)
        for name, group in grouped(answers, "task_type").items():
            found[name]["R"] = 100 * mean([(answer.verdict.parsed or {"R": 0.0})["R"] for answer in group])
        return found


class RefSAV(MeViS):
    """Long and short descriptions of objects of SA-V; the score is the mean of both."""

    name, title, size, splits = "ref_sav", "Ref-SAV", 1945, ("valid",)
    source = "huggingface.co/datasets/Dense-World/Sa2VA-Eval; videos of SA-V as frames"
    layout = "meta_expressions_valid.json\nmask_dict.json\nJPEGImages/{video}/{frame}.jpg"
    licence = "SA-V: CC BY 4.0"
    folder, metadata = (), "meta_expressions_valid.json"
    groups: ClassVar[Mapping[int, str]] = {0: "long", 1: "short"}


class RefDAVIS17(ReferringVideos):
    """Expressions of four annotators for each object of DAVIS 2017."""

    name, title, size, splits = "ref_davis17", "Ref-DAVIS17", 244, ("valid",)
    source = "github.com/wjn922/ReferFormer (conversion to the form of Ref-YouTube-VOS); videos of davischallenge.org"
    layout = (
        "meta_expressions/valid/meta_expressions.json\nvalid/JPEGImages/{video}/{frame}.jpg\n"
        "valid/Annotations/{video}/{frame}.png"
    )
    licence = "DAVIS: CC BY-NC 4.0"

    def expressions(self, data):
        for video, entry in data.json("meta_expressions", "valid", "meta_expressions.json")["videos"].items():
            frames = [data.path("valid", "JPEGImages", video, f"{frame}.jpg") for frame in entry["frames"]]
            pictures = [data.path("valid", "Annotations", video, f"{frame}.png") for frame in entry["frames"]]
            numbers = sorted({int(expression["obj_id"]) for expression in entry["expressions"].values()})
            by_number = _objects(pictures, numbers)
            for name, expression in entry["expressions"].items():
                yield video, frames, name, expression, [by_number[int(expression["obj_id"])]]


def _objects(pictures: Sequence[str], numbers: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Returns the masks of objects by their number, from pictures whose colours are numbers."""
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in numbers}
    for picture in pictures:
        try:
            with Image.open(pathlib.Path(picture)) as image:
                colours = np.asarray(image)
        except OSError as error:
            raise InputError(f"{picture}: cannot be read ({error}); download it again") from None
        for number in numbers:
            found[number].append(encode_rle(colours == number))
    return found


def _means(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    values = [(answer.verdict.parsed or {"J": 0.0, "F": 0.0}) for answer in answers]
    sides = {name: 100 * mean([value[name] for value in values]) for name in ("J", "F")}
    return {**sides, "J&F": (sides["J"] + sides["F"]) / 2}
