"""Tests the whole pipeline, from files and text to greedy text, against transformers' processor and model."""

import numpy as np
import pytest
from PIL import Image

import vl3_jax as vl3
from support.checkpoints import DATA, config_with_real_vocabulary, write_reference_checkpoint
from support.forward import forward
from support.tolerances import END_TO_END, GREEDY_MARGIN, relative_error
from vl3_jax.processing.packed_batch import BatchShape, pack

pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
from support.reference import reference_model, torch

IMAGE = DATA / "media" / "images" / "handwriting.png"
OPENING, CLOSING = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference, its processor, and the same checkpoint loaded as a `ChatModel`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
    from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    reference = reference_model(config_with_real_vocabulary())
    folder = write_reference_checkpoint(tmp_path_factory.mktemp("reference") / "tiny", reference)
    processor = VideoLlama3Processor(
        image_processor=VideoLlama3ImageProcessorPil(min_pixels=3136, max_pixels=300 * 196, merge_size=1),
        video_processor=VideoLlama3VideoProcessor(min_pixels=12_544, max_pixels=300 * 784, merge_size=2),
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
    )
    return reference, processor, vl3.load(folder)


def moving_frames() -> np.ndarray:
    """Returns [6, 112, 168, 3] uint8: a real image with a corner that changes, of a size that no rule resizes."""
    image = np.asarray(Image.open(IMAGE).convert("RGB"))[:112, :168]
    frames = np.repeat(image[None], 6, axis=0)
    for index in range(1, 6):
        frames[index, :56, : 28 * index] = np.roll(frames[index, :56, : 28 * index], 7 * index, axis=1)
    return frames


CASES = {
    "text": ([], "What color is a banana?", "What color is a banana?"),
    "image": ([("image", IMAGE)], "<|image_pad|>\nWhat is it?", "What is it?"),
    "two images": (
        [("image", IMAGE), ("image", IMAGE)],
        "<|image_pad|>\n<|image_pad|>\nSame?",
        "Same?",
    ),
    "video": ([("video", "frames")], "<|video_pad|>\nWhat happens?", "What happens?"),
    "image and video": (
        [("image", IMAGE), ("video", "frames")],
        "<|image_pad|>\n<|video_pad|>\nWhat happens?",
        "What happens?",
    ),
}
SLOW = ("two images", "image", "video")  # of which the other cases have each part


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_ids_pixels_mask_logits_and_text_equal_the_reference(pair, case):
    reference, processor, model = pair
    media, prompt, question = CASES[case]
    inputs = _reference_inputs(processor, media, OPENING + prompt + CLOSING)
    parts = [_content_part(kind, source) for kind, source in media]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    settings = {"preprocess": "native", "max_visual_tokens": 300, "max_new_tokens": NEW_TOKENS}
    output = model.answer(messages, **settings)
    sample = output.processed.sample

    assert sample.tokens.tolist() == inputs["input_ids"][0].tolist()
    visuals = {
        "image": [v for v in sample.visuals if v.grid[0] == 1],
        "video": [v for v in sample.visuals if v.grid[0] > 1],
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if visuals[kind]:
            ours = np.concatenate([v.patches for v in visuals[kind]])
            np.testing.assert_array_equal(ours, np.rint((inputs[name].numpy() + 1) * 127.5))
    if visuals["video"]:
        np.testing.assert_array_equal(visuals["video"][0].keep, inputs["video_compression_mask"].numpy())
        assert not visuals["video"][0].keep.all()

    with torch.no_grad():
        expected = reference(**inputs).logits[0].numpy()
    shape = BatchShape(
        len(sample.tokens), max(sum(len(v.patches) for v in sample.visuals), 1), max(sample.num_vision_tokens, 1)
    )
    logits = forward(model.engine.model, model.engine.params, pack([[sample]], shape))[0]
    print(f"{case}: largest relative difference of the logits {relative_error(logits, expected):.1e}")
    assert relative_error(logits, expected) <= END_TO_END

    expected_output = reference.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=[151_645, 151_643],
        output_logits=True,
        return_dict_in_generate=True,
    )
    margins = [float(-np.diff(torch.topk(step[0], 2).values.numpy())[0]) for step in expected_output.logits]
    decided = next((i for i, margin in enumerate(margins) if margin < GREEDY_MARGIN), len(margins))
    generated = expected_output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert decided >= NEW_TOKENS // 2 or len(generated) < NEW_TOKENS
    assert output.token_ids[:decided] == generated[:decided]


def _content_part(kind: str, source) -> dict:
    if kind == "image":
        return {"type": "image", "image": source}
    return {"type": "video", "video": moving_frames(), "timestamps": [float(second) for second in range(6)]}


def _reference_inputs(processor, media, text: str) -> dict:
    from transformers.video_utils import VideoMetadata

    arguments = {"text": [text], "return_tensors": "pt"}
    images = [Image.open(source) for kind, source in media if kind == "image"]
    if images:
        arguments["images"] = images
    if any(kind == "video" for kind, _ in media):
        arguments["videos"] = [torch.tensor(moving_frames()).permute(0, 3, 1, 2)]
        arguments["video_metadata"] = [VideoMetadata(total_num_frames=6, fps=1, frames_indices=list(range(6)))]
    inputs = dict(processor(**arguments))
    return {
        name: value
        for name, value in inputs.items()
        if name not in ("video_metadata", "token_type_ids", "mm_token_type_ids")
    }
