"""GCG of Grand-f: a caption of an image whose phrases have masks."""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict, mean
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.grounded_captions import GroundedImage, compare_grounding, grounding_metrics
from vl3_jax.evaluation.scorers.meteor import Meteor
from vl3_jax.evaluation.scorers.phrases import PhraseSimilarity, lemma_similarity
from vl3_jax.processing.mask_files import decode_rle
from vl3_jax.sa2va.templates import GROUNDED_CAPTION

_FOLDER = "annotations", "val_test"


class GroundedCaptions(Benchmark):
    """mIoU, recall, AP50 and METEOR.

    The original compares phrases by BERT (the mean over its last layer, cosine from 0.5 on). Set `similarity` to
    `vl3_jax.evaluation.scorers.phrases.embedding_similarity` of such a model for that; without it phrases are compared
    by their lemmas, and the recall is named so.

    Attributes:
      similarity: Compares phrases.
    """

    name, title, kind, size, draws = "gcg", "GCG", "image", 2500, True
    rows = (PaperRow("AP50", ("AP50",)),)
    splits = ("val", "test")
    source = "huggingface.co/datasets/MBZUAI/GranD-f, annotations/val_test; images of SA-1B (GranDf_HA_images)"
    layout = (
        "annotations/val_test/{split}_gcg_coco_caption_gt.json\n"
        "annotations/val_test/{split}_gcg_coco_mask_gt.json\nGranDf_HA_images/val_test/{image}.jpg"
    )
    licence = "annotations: Apache-2.0; images: the terms of SA-1B"
    max_new_tokens = 512
    similarity: PhraseSimilarity = staticmethod(lemma_similarity)

    def items(self, data: DataFolder) -> list[Item]:
        captions = data.json(*_FOLDER, f"{self.split}_gcg_coco_caption_gt.json")
        shapes = collections.defaultdict(list)
        for shape in data.json(*_FOLDER, f"{self.split}_gcg_coco_mask_gt.json")["annotations"]:
            shapes[shape["image_id"]].append(shape["segmentation"])
        entries = collections.defaultdict(list)
        for entry in captions["annotations"]:
            entries[entry["image_id"]].append(entry)
        items = []
        for image in captions["images"]:
            number, own = image["id"], entries[image["id"]]
            path = data.path("GranDf_HA_images", "val_test", f"{number}.jpg")
            captions_of_image = [entry["caption"] for entry in own]
            reference = {"target": captions_of_image, "phrases": own[0]["labels"], "masks": shapes[number]}
            media = [{"type": "image", "image": path}]
            items.append(Item(str(number), media, GROUNDED_CAPTION, {**reference, "task_type": None}))
        return items

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        drawn, wanted = (_stacked(masks) for masks in (response["masks"][0], reference["masks"]))
        phrases = [phrase or "" for phrase in response["phrases"]]
        if not len(drawn):
            drawn = np.zeros((0, *wanted.shape[1:]), bool)
        targets = reference["phrases"][: len(wanted)]
        found = compare_grounding(phrases, drawn, targets, wanted[: len(targets)], self.similarity, scoring.official)
        meteor = _meteor()
        score = None if meteor is None else meteor.score(response["caption"], reference["target"])
        parsed = {**found._asdict(), "METEOR": score}
        return Verdict(found.paired, parsed, None if response["phrases"] else "no mask")

    def metrics(self, answers):
        parsed = [answer.verdict.parsed for answer in answers if answer.verdict.parsed]
        values = grounding_metrics(
            GroundedImage(**{name: each[name] for name in GroundedImage._fields}) for each in parsed
        )
        if self.similarity is lemma_similarity:
            values = {f"{name} (lemmas)" if name == "Recall" else name: value for name, value in values.items()}
        meteor = _meteor()
        if meteor is not None:
            values[meteor.name] = 100 * mean([each["METEOR"] for each in parsed if each["METEOR"] is not None])
        return values

    def details(self, answers):
        return {}


def _stacked(masks: Any) -> np.ndarray:
    return np.stack([decode_rle(mask) for mask in masks]) if masks else np.zeros((0, 1, 1), bool)


@functools.cache
def _meteor() -> Meteor | None:
    """Returns METEOR with the stages that this machine has, or None without NLTK."""
    try:
        return Meteor()
    except InputError:
        return None
