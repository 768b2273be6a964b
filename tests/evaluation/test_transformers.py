"""nano in transformers: the native export gives the same greedy answers for each kind of media."""

import numpy as np
import pytest
from PIL import Image

import vl3_jax as vl3
from support import reference
from support.checkpoints import write_small_checkpoint
from support.tolerances import GREEDY_MARGIN
from vl3_jax.checkpoint.opening import NANO_FOLDER
from vl3_jax.cli.main import main
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection

torch = reference.torch
KINDS = {"text": "addition", "image": "box", "two images": "pair", "video": "static"}
COUNT = 4  # questions per kind
NEW_TOKENS = 28  # more than a reference answer has
# Pixels of a merged token. Images whose sides are multiples are not resampled, in which torchvision and Pillow differ.
MERGED = 28


@pytest.fixture(scope="module", params=["random", "packaged"])
def pair(request, tmp_path_factory):
    """Our model, and its export in transformers with the processor of transformers."""
    from transformers import AutoProcessor, VideoLlama3ForConditionalGeneration

    folder = tmp_path_factory.mktemp("nano")
    if request.param == "random":
        source = write_small_checkpoint(folder / "official", size="nano")
        (source / "generation_config.json").unlink()
    else:
        source = NANO_FOLDER
    assert main(["convert", "export", str(source), str(folder / "native"), "--format", "native"]) == 0
    model = VideoLlama3ForConditionalGeneration.from_pretrained(folder / "native").eval()
    return vl3.load(source), model, AutoProcessor.from_pretrained(folder / "native")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "video")) for kind in KINDS])
def test_greedy_answers_are_the_same(pair, kind):
    chat_model, model, processor = pair
    (task,) = find([f"nano/{KINDS[kind]}"], QuestionSelection(count=30))
    questions = [question for question in task.items() if not resampled(question)][:COUNT]
    assert len(questions) == COUNT
    answers, decided = [], 0
    for question in questions:
        inputs = inputs_of(processor, question)
        content = question.content(lambda part: ())
        ours = chat_model.answer([{"role": "user", "content": content}], max_new_tokens=NEW_TOKENS)
        sample = ours.processed.sample
        ids = inputs["input_ids"][0].numpy()
        is_vision = np.zeros(len(ids), bool) if sample.is_vision is None else sample.is_vision
        np.testing.assert_array_equal(sample.tokens[~is_vision], ids[~is_vision])
        if sample.visuals:
            name = "pixel_values" if "pixel_values" in inputs else "pixel_values_videos"
            pixels = np.concatenate([visual.patches for visual in sample.visuals])
            np.testing.assert_array_equal(pixels, np.rint((inputs[name].numpy() + 1) * 127.5))
        out = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        theirs = out.sequences[0, len(ids) :].tolist()
        margins = [float(-np.diff(torch.topk(step[0], 2).values.numpy())[0]) for step in out.logits]
        until = next((step for step, margin in enumerate(margins) if margin < GREEDY_MARGIN), len(theirs))
        decided += until == len(theirs)
        assert ours.token_ids[:until] == theirs[:until]
        answers.append(tuple(theirs))
    assert len(set(answers)) > 1
    assert decided >= COUNT / 2


def media_of(question) -> list[dict]:
    return [part for part in question.content(lambda part: ()) if part["type"] != "text"]


def resampled(question) -> bool:
    sides = [side for part in media_of(question) for side in part[part["type"]].shape[-3:-1]]
    return any(side % MERGED for side in sides)


def inputs_of(processor, question) -> dict:
    """Returns the output of transformers' processor for a question."""
    from transformers.video_utils import VideoMetadata

    media = media_of(question)
    placeholders = "".join("<|image_pad|>\n" if part["type"] == "image" else "<|video_pad|>\n" for part in media)
    text = f"<|im_start|>user\n{placeholders}{question.text}<|im_end|>\n<|im_start|>assistant\n"
    arguments = {"text": [text], "return_tensors": "pt"}
    images = [Image.fromarray(part["image"]) for part in media if part["type"] == "image"]
    videos = [part["video"] for part in media if part["type"] == "video"]
    if images:
        arguments["images"] = images
    if videos:
        arguments["videos"] = [torch.tensor(video).permute(0, 3, 1, 2) for video in videos]
        arguments["video_metadata"] = [
            VideoMetadata(total_num_frames=len(video), fps=1, frames_indices=list(range(len(video))))
            for video in videos
        ]
    unused = ("video_metadata", "token_type_ids", "mm_token_type_ids")
    return {name: value for name, value in dict(processor(**arguments)).items() if name not in unused}
