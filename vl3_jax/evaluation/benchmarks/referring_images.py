"""RefCOCO, RefCOCO+ and RefCOCOg: the mask of an object in an image that a phrase names."""

import io
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.mask_answers import masks_by_frame, segmentation_rle, unions
from vl3_jax.evaluation.scorers.mask_overlap import Overlap, cumulative_iou, generalised_iou

_TEMPLATE = " Please segment {} in this image."


class ReferringImages(Benchmark):
    """cIoU and gIoU; all masks of an answer count as one, and an answer without any as an empty one."""

    kind, draws = "image", True
    source = "github.com/lichengunc/refer (the file `refs` of a split set and instances.json); images of COCO train2014"
    licence = "annotations: Apache-2.0; images: the terms of COCO and Flickr"
    max_new_tokens = 512
    by: ClassVar[str]

    def items(self, data: DataFolder) -> list[Item]:
        instances = data.json("instances.json")
        images = {image["id"]: image for image in instances["images"]}
        shapes = {shape["id"]: shape for shape in instances["annotations"]}
        items = []
        for ref in _read_refs(data, f"refs({self.by}).p"):
            if ref["split"] != self.split:
                continue
            image, shape = images[ref["image_id"]], shapes[ref["ann_id"]]
            target = segmentation_rle(shape["segmentation"], image["height"], image["width"])
            reference = {"target": target, "task_type": None}
            path = data.path("images", image["file_name"])
            for sentence in ref["sentences"]:
                media = [{"type": "image", "image": path}]
                items.append(Item(str(sentence["sent_id"]), media, _TEMPLATE.format(sentence["sent"]), reference))
        return items

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        (masks,) = masks_by_frame(response, 1)
        overlap = Overlap.of(*unions(masks, [reference["target"]]))
        return Verdict(overlap.iou, list(overlap), None if masks else "no mask")

    def metrics(self, answers):
        overlaps = [Overlap(*(answer.verdict.parsed or _missed(answer.reference))) for answer in answers]
        return {"cIoU": 100 * cumulative_iou(overlaps), "gIoU": 100 * generalised_iou(overlaps)}

    def details(self, answers):
        return {}


def _missed(reference: Mapping[str, Any]) -> Overlap:
    """Returns the overlap of a target with the mask of a question that was not answered."""
    return Overlap.of(*unions([], [reference["target"]]))


class RefCOCO(ReferringImages):
    """Phrases of a game for two, with places in the image."""

    name, title, size, by = "refcoco", "RefCOCO", 10_834, "unc"
    rows = (PaperRow("RefCOCO", ("cIoU",)),)
    splits = ("val", "testA", "testB")
    layout = "refs(unc).p\ninstances.json\nimages/{file_name of instances.json}"


class RefCOCOPlus(ReferringImages):
    """Phrases of the same game without places."""

    name, title, size, by = "refcoco+", "RefCOCO+", 10_758, "unc"
    rows = (PaperRow("RefCOCO+", ("cIoU",)),)
    splits = ("val", "testA", "testB")
    layout = RefCOCO.layout


class RefCOCOg(ReferringImages):
    """Longer phrases, written without a game; the split of the University of Maryland."""

    name, title, size, by = "refcocog", "RefCOCOg", 4896, "umd"
    rows = (PaperRow("RefCOCOg", ("cIoU",)),)
    splits = ("val", "test")
    layout = "refs(umd).p\ninstances.json\nimages/{file_name of instances.json}"


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_refs(data: DataFolder, name: str) -> list[dict[str, Any]]:
    try:
        refs = _PlainUnpickler(io.BytesIO(data.content(name))).load()
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes of it
        raise InputError(f"{data.path(name)}: not a pickle of plain values ({error}); download it again") from None
    if not isinstance(refs, list):
        raise InputError(f"{data.path(name)}: holds no list of references; download it again")
    return refs
