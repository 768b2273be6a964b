"""What a model is asked for masks, word for word as it was trained."""

import re
from collections.abc import Sequence

import numpy as np

from vl3_jax.processing.messages import Region

GROUNDED_CAPTION = (
    "Could you please give me a brief description of the image? Please respond with interleaved segmentation masks "
    "for the corresponding parts of the answer."
)
DESCRIBE = "Please describe region1."  # of a region, where nobody asks anything else

_ASKED = re.compile(r"\b(segment\w*|masks?)\b", re.IGNORECASE)
_ORDER = re.compile(
    r"(please|segment|highlight|identify|find|locate|show|point|mark|outline|mask|track|give|(can|could|would) you)\b",
    re.IGNORECASE,
)
_WITH_MASK = "Please respond with a segmentation mask."


def mask_request(text: str, video: bool = False) -> str:
    """Returns the text that asks for the mask of what a text names.

    A phrase, such as "the red car", enters the template of referring segmentation. A question gets the request for a
    mask behind it. A text that is a request already, because it speaks of segmenting or of masks or begins like an
    order, stays as it is.

    Args:
      text: Phrase, question or request.
      video: Whether it is about a video.
    """
    text = text.strip()
    if _ASKED.search(text) or _ORDER.match(text):
        return text
    return video_expression(text) if video or "?" in text else f" Please segment {text.rstrip('.')} in this image."


def video_expression(text: str) -> str:
    """Returns the request for an expression of a video benchmark: a statement, or a question."""
    return f" {text} {_WITH_MASK}" if "?" in text else f"Please segment {text.rstrip('.')}."


def region_request(masks: Sequence[np.ndarray], question: str = DESCRIBE) -> list[str | Region]:
    """Returns the parts of a message about regions of the image in front of it.

    Args:
      masks: Mask of each region, [h, w] bool.
      question: The question, which calls them region1, region2, ...
    """
    parts: list[str | Region] = []
    for number, mask in enumerate(masks, start=1):
        start = ", " if parts else f"There are {len(masks)} part regions in the picture: "
        parts += [f"{start}region{number}", Region(mask)]
    return [*parts, f".\n{question}"]
