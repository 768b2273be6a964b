"""Answers that are masks, as JSON values: what a benchmark of objects asks for, and how it reads it.

    {"text": "It is [SEG].", "caption": "It is .", "phrases": [null], "masks": [[{"size": [9, 9], "counts": "..."}]]}

`masks` has for each frame, an image being one, the run lengths of each object; `phrases` has the words of each, and
`caption` is the text without tags. `vl3_jax.evaluation.scorers.mask_answers` reads them.
"""

from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Item
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.conversations import Conversation, reply
from vl3_jax.inference.grounded_model import GroundedModel
from vl3_jax.inference.requests import Generation
from vl3_jax.processing.mask_files import encode_rle
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.sa2va.grounded_text import read_grounded


def drawn_answer(
    model: ChatModel, item: Item, sample: Sample, settings: AnswerSettings
) -> Conversation[tuple[dict[str, Any], Generation]]:
    """Asks for an answer and draws its objects, frame by frame.

    Args:
      model: The model.
      item: The question.
      sample: Its prompt.
      settings: Decoding.

    Returns:
      The answer and its tokens.

    Raises:
      InputError: The model draws nothing, or a frame cannot be read.
    """
    if not isinstance(model, GroundedModel):
        raise InputError("the model draws no masks; ask one that `vl3 convert init --base ... --sam2 ...` began with")
    _, generation = yield from reply(model.processor.tokenizer, sample, settings)
    grounded = read_grounded(generation.tokens, model.processor.tokenizer)
    vectors = model.drawer.vectors([generation.hidden[named.place] for named in grounded.objects])
    if item.frames:
        seen = [item.frames.index(part["image"]) for part in item.media]
        frames = model.drawer.track(item.frames, vectors, seen, item.mode)
    else:
        frames = iter([model.drawer.draw(item.content(lambda part: ())[0]["image"], vectors)])
    masks = [[encode_rle(mask) for mask in frame.masks] for frame in frames]
    phrases = [named.phrase for named in grounded.objects]
    return {"text": grounded.text, "caption": grounded.caption, "phrases": phrases, "masks": masks}, generation
