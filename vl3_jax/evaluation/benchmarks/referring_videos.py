"""What benchmarks of expressions in videos share: the masks of what each names, in all frames."""

import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import (
    OVERALL,
    Benchmark,
    Item,
    ScoredAnswer,
    Scoring,
    Verdict,
    grouped,
    mean,
)
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.boundary import boundary_similarity
from vl3_jax.evaluation.scorers.mask_answers import RunLengths, masks_by_frame, unions
from vl3_jax.evaluation.scorers.mask_overlap import Overlap
from vl3_jax.evaluation.submission_files import SubmissionFiles
from vl3_jax.inference.mask_drawer import TrackingMode, choose_key_frames
from vl3_jax.processing.images import open_image
from vl3_jax.sa2va.templates import video_expression

_IMAGE_FOLDERS = ("JPEGImages", "videos")  # of frames, where they do not lie beside the annotations


class VideoExpression(NamedTuple):
    """An expression about a video.

    Attributes:
      video: Name of the video.
      name: Name of the expression, unique among those of the video.
      frames: Files of all frames.
      text: The expression.
      target: Masks of what it names, by frame and object; None where they are not published.
      group: Name of the group that it is scored with, if there are groups.
      others: Further masks by frame that an answer is compared with, by their key in the reference.
    """

    video: str
    name: str
    frames: Sequence[str]
    text: str
    target: Sequence[Sequence[RunLengths]] | None
    group: str | None = None
    others: Mapping[str, Sequence[Sequence[RunLengths]]] = {}


class ReferringVideos(Benchmark):
    """J, F and J&F: means over the frames of an expression, then over expressions, then over groups.

    The model sees the key frames of each video.

    Attributes:
      mode: How videos are tracked; see `vl3_jax.inference.mask_drawer`.
      key_frames: Number of frames that the model sees; None is 5.
      measures: What is reported beside J&F.
      archive: Folder in the archive of a submission.
    """

    kind, draws = "video", True
    max_new_tokens = 512
    mode: TrackingMode = "sa2va"
    key_frames: int | None = None
    measures: ClassVar[tuple[str, ...]] = ("J", "F")
    archive: ClassVar[str] = ""

    def expressions(self, data: DataFolder) -> Iterator[VideoExpression]:
        """Yields all expressions."""
        raise NotImplementedError

    def items(self, data: DataFolder) -> list[Item]:
        items = []
        for each in self.expressions(data):
            if not each.frames:
                raise InputError(f"{data.root}: video {each.video} has no frames; download its annotations again")
            seen = choose_key_frames(len(each.frames), self.key_frames, self.mode)
            media = [{"type": "image", "image": each.frames[index]} for index in seen]
            reference = {"target": each.target, "task_type": each.group, **each.others}
            name, text = f"{each.video}/{each.name}", video_expression(each.text)
            items.append(Item(name, media, text, reference, frames=each.frames, mode=self.mode))
        return items

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        sides = self.sides(reference)
        drawn = masks_by_frame(response, len(sides[0]))
        frames = [self.compare(*unions(*frame)) for frame in zip(drawn, *sides, strict=True)]
        means = {name: mean([frame[name] for frame in frames]) for name in self.measures}
        nothing = not any(drawn) and means["J"] < 1
        return Verdict((means["J"] + means["F"]) / 2, means, "no mask" if nothing else None)

    def sides(self, reference: Mapping[str, Any]) -> list[Sequence[Sequence[RunLengths]]]:
        """Returns what an answer is compared with, masks by frame and object; the first is the target."""
        return [reference["target"]]

    def compare(self, drawn: np.ndarray, target: np.ndarray) -> dict[str, float]:
        """Returns the measures of one frame, from 0 to 1."""
        return {"J": Overlap.of(drawn, target).iou, "F": boundary_similarity(drawn, target)}

    def metrics(self, answers: Sequence[ScoredAnswer]) -> dict[str, Any]:
        groups = {name: self._means(group) for name, group in grouped(answers, "task_type").items()}
        parts = list(groups.values()) or [self._means(answers)]
        overall = {name: mean([part[name] for part in parts]) for name in parts[0]}
        return {**groups, **{name: overall[name] for name in self.measures}, OVERALL: overall["J&F"]}

    def details(self, answers):
        return {}

    def submit(self, answers: Mapping[str, Any], items: Sequence[Item]) -> SubmissionFiles:
        """Returns a picture of each mask, FOLDER/VIDEO/EXPRESSION/FRAME.png with 0 and 255, in this order."""
        answered = [item for item in items if item.id in answers]

        def files() -> Iterator[tuple[str, bytes]]:
            for item in answered:
                try:
                    masks = masks_by_frame(answers[item.id], len(item.frames))
                    for frame, objects in zip(item.frames, masks, strict=True):
                        name = pathlib.PurePosixPath(self.archive, item.id, f"{pathlib.Path(frame).stem}.png")
                        yield str(name), _picture(objects, frame)
                except InputError as error:
                    raise InputError(f"{self.task}/{item.id}: {error}") from None

        return SubmissionFiles(files)

    def _means(self, answers: Sequence[ScoredAnswer]) -> dict[str, float]:
        values = [answer.verdict.parsed or dict.fromkeys(self.measures, 0.0) for answer in answers]
        means = {name: 100 * mean([value[name] for value in values]) for name in self.measures}
        return {**means, "J&F": (means["J"] + means["F"]) / 2}


def frame_files(data: DataFolder, video: str, frames: Sequence[str], *parts: str) -> list[str]:
    """Returns the files of the frames of a video, which lie in a folder of images below that of the annotations."""
    inside = next(([name] for name in _IMAGE_FOLDERS if data.exists(*parts, name)), [])
    return [data.path(*parts, *inside, video, f"{frame}.jpg") for frame in frames]


def _picture(objects: Sequence[RunLengths], frame: str) -> bytes:
    """Returns a PNG of the union of masks, which has the size of the frame."""
    image = open_image(frame)
    (mask,) = unions(objects) if objects else (np.zeros((image.height, image.width), bool),)
    if mask.shape != (image.height, image.width):
        raise InputError(
            f"a mask of {mask.shape[0]} x {mask.shape[1]} pixels, and {frame} has {image.height} x {image.width}; give "
            "masks at the size of the frame"
        )
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(out, "png", compress_level=1)
    return out.getvalue()
