"""Region captions of RefCOCOg: a short description of an object that is shown by its mask."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict, mean
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.mask_answers import segmentation_rle
from vl3_jax.evaluation.scorers.meteor import Meteor
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_QUESTION = "Please give me a short description of the region in the picture marked by region1."
_OPENING = re.compile(r"^(the\s+)?(region\s+(marked\s+)?(by|as)\s+)?region\s*1\b\s*(is|shows|:)?\s*", re.IGNORECASE)
# What the original takes out of a caption, wherever it stands, words that hold it included.
_TAKEN_OUT = ("\n", "region1", "Region1", "The region marked by", "The region marked as", "The region marked")
_TAKEN_OUT += ("is", "shows", ":")


class RegionCaptions(Benchmark):
    """METEOR of each description against the phrase that a person wrote for the object."""

    name, title, kind, size, shows_regions = "region_captions", "Region captions", "image", 4896, True
    rows = (PaperRow("Region captions", ("METEOR",)),)
    splits = ("val",)
    source = (
        "huggingface.co/datasets/Dense-World/Sa2VA-Eval (region_caption/refcocog, from github.com/CircleRadon/Osprey); "
        "images of COCO train2014"
    )
    layout = "finetune_refcocog_val_with_mask.json\nimages/{file_name}"
    licence = "annotations: Apache-2.0; images: the terms of COCO and Flickr"
    max_new_tokens = 512

    @functools.cached_property
    def meteor(self) -> Meteor:
        """What scores the captions; an InputError says that it is not available."""
        return Meteor()

    def items(self, data: DataFolder) -> list[Item]:
        _ = self.meteor  # says what is missing before a model is asked
        content = data.json("finetune_refcocog_val_with_mask.json")
        images = {image["id"]: image for image in content["images"]}
        items = []
        for shape in content["annotations"]:
            image = images[shape["image_id"]]
            region = segmentation_rle(shape["segmentation"], image["height"], image["width"])
            media = [{"type": "image", "image": data.path("images", image["file_name"])}]
            reference = {"target": [image["caption"]], "task_type": None}
            items.append(Item(str(shape["id"]), media, _QUESTION, reference, regions=[region]))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        caption = _official_caption(response) if scoring.official else _OPENING.sub("", response.strip())
        if not caption:
            raise UnparsedError("no caption")
        return Verdict(self.meteor.score(caption, reference["target"]), caption)

    def metrics(self, answers):
        return {self.meteor.name: 100 * mean([answer.score for answer in answers])}

    def details(self, answers):
        return {}


def _official_caption(text: str) -> str:
    for taken_out in _TAKEN_OUT:
        text = text.replace(taken_out, "")
    return " ".join(text.split()).strip("'").strip()
