"""GCG of Grand-f: a caption of an image whose phrases have masks."""

import collections
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, ScoredAnswer, Scoring, Verdict, mean
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.cider import cider
from vl3_jax.evaluation.scorers.grounded_captions import GroundedImage, compare_grounding, grounding_metrics
from vl3_jax.evaluation.scorers.mask_answers import masks_by_frame, stacks
from vl3_jax.evaluation.scorers.meteor import NOT_AVAILABLE, available_meteor
from vl3_jax.evaluation.scorers.phrases import PhraseSimilarity, lemma_similarity
from vl3_jax.sa2va.templates import GROUNDED_CAPTION

_FOLDER = "annotations", "val_test"


class GroundedCaptions(Benchmark):
    """mIoU, recall and AP50 of the masks, METEOR and CIDEr of the captions.

    The original compares phrases by BERT (the mean over its last layer, cosine from 0.5 on). Set `similarity` to
    `vl3_jax.evaluation.scorers.phrases.embedding_similarity` of such a model for that; without it phrases are compared
    by their lemmas, and the recall is named so.

    Attributes:
      similarity: Compares phrases.
    """

    name, title, kind, size, draws = "gcg", "GCG", "image", 2500, True
    rows = (PaperRow("GCG", ("AP50",)),)
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
        for image in sorted(captions["images"], key=lambda image: str(image["id"])):  # as COCO breaks ties
            number, own = image["id"], entries[image["id"]]
            path = data.path("GranDf_HA_images", "val_test", f"{number}.jpg")
            captions_of_image = [entry["caption"] for entry in own]
            reference = {"target": captions_of_image, "phrases": own[0]["labels"], "masks": shapes[number]}
            media = [{"type": "image", "image": path}]
            items.append(Item(str(number), media, GROUNDED_CAPTION, {**reference, "task_type": None}))
        return items

    def verdict(self, response: Any, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        drawn, wanted = stacks(*masks_by_frame(response, 1), reference["masks"])
        response = {"caption": response} if isinstance(response, str) else response
        phrases = [phrase or "" for phrase in response.get("phrases") or []]
        if len(phrases) != len(drawn):
            raise InputError(f"the answer has {len(phrases)} phrases and {len(drawn)} masks; give a phrase for each")
        found = compare_grounding(phrases, drawn, reference["phrases"], wanted, self.similarity, scoring.official)
        caption, meteor = response.get("caption") or "", available_meteor()
        parsed = {**found._asdict(), "caption": caption}
        if meteor is not None:
            parsed["METEOR"] = meteor.score(caption, reference["target"])
        return Verdict(found.paired, parsed, None if len(drawn) else "no mask")

    def metrics(self, answers):
        meteor = available_meteor()
        values = grounding_metrics(map(_grounding, answers))
        if self.similarity is lemma_similarity:
            values = {f"{name} (lemmas)" if name == "Recall" else name: value for name, value in values.items()}
        parsed = [answer.verdict.parsed or {} for answer in answers]
        captions, references = [each.get("caption", "") for each in parsed], [a.reference["target"] for a in answers]
        values["CIDEr"] = 100 * mean(cider(captions, references))
        if meteor is None:
            return {**values, NOT_AVAILABLE: None}
        return {**values, meteor.name: 100 * mean([each.get("METEOR", 0.0) for each in parsed])}

    def details(self, answers):
        return {}


def _grounding(answer: ScoredAnswer) -> GroundedImage:
    """Returns what was found in an image; nothing where there is no answer."""
    found = answer.verdict.parsed
    if not found:
        return GroundedImage([], len(answer.reference["masks"]), 0)
    return GroundedImage(**{name: found[name] for name in GroundedImage._fields})
