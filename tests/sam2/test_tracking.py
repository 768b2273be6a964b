"""Tracking equals transformers' `sam2_video` frame by frame, and does not depend on how frames and objects are grouped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import END_TO_END, REORDERED, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.sam2_reference import sam2_params, sam2_reference, sam2_tensors, tiny_sam2  # noqa: E402
from transformers import Sam2VideoInferenceSession  # noqa: E402
from vl3_jax.inference.object_tracker import ObjectTracker  # noqa: E402
from vl3_jax.inference.segmenter import Segmenter  # noqa: E402
from vl3_jax.processing.object_prompts import Prompt  # noqa: E402
from vl3_jax.sam2.sam2_model import Sam2  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZE = 128


@functools.cache
def both(version: str = "2.1", time_gain: float = 0.2):
    config = tiny_sam2(version, memory_layers=1)
    reference = sam2_reference(config, time_gain=time_gain)
    return reference, Segmenter(Sam2(config), jax.device_put(sam2_params(sam2_tensors(reference), config)))


@functools.cache
def video(count: int = 9) -> np.ndarray:
    """Returns frames of the size of the input, so that no resizing hides a difference, [count, size, size, 3] uint8."""
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (SIZE, SIZE, 3))
    return np.stack([np.roll(still, 3 * i, axis=1) + rng.integers(-9, 9, still.shape) for i in range(count)]).clip(
        0, 255
    ).astype(np.uint8)


def reference_pixels(frames: np.ndarray, config) -> torch.Tensor:
    pixels = (frames.astype(np.float32) / 255 - np.float32(config.image_mean)) / np.float32(config.image_std)
    return torch.tensor(pixels).permute(0, 3, 1, 2)


def reference_track(reference, config, frames, prompts, start=0, reverse=False) -> dict[int, torch.Tensor]:
    """Tracks one object with the reference; returns the low-resolution logits of each frame, and its session."""
    session = Sam2VideoInferenceSession(reference_pixels(frames, config), SIZE, SIZE, dtype=torch.float32)
    row = session.obj_id_to_idx(1)
    outputs = {}

    def add(prompt):
        if prompt.mask is not None:
            session.add_mask_inputs(row, prompt.frame, torch.tensor(prompt.mask)[None, None].float())
        else:
            points = torch.tensor([[[point[:2] for point in prompt.points]]], dtype=torch.float32)
            labels = torch.tensor([[[point[2] for point in prompt.points]]], dtype=torch.int32)
            session.add_point_inputs(row, prompt.frame, {"point_coords": points, "point_labels": labels})
        session.obj_with_new_inputs = [1]
        return reference(session, frame_idx=prompt.frame, reverse=reverse)

    for prompt in prompts:
        if not prompt.correction:
            add(prompt)
    run = reference.propagate_in_video_iterator
    for output in run(session, start_frame_idx=start, reverse=reverse):
        outputs[output.frame_idx] = output.pred_masks[:, 0].numpy()
    for prompt in prompts:
        if prompt.correction:
            outputs[prompt.frame] = add(prompt).pred_masks[:, 0].numpy()
            for output in run(session, start_frame_idx=prompt.frame + 1):
                outputs[output.frame_idx] = output.pred_masks[:, 0].numpy()
    return outputs


def click(frame=0, x=40.0, y=60.0, label=1, obj=1, correction=False) -> Prompt:
    return Prompt(frame, obj, ((x, y, label),), correction=correction)


MASK = np.zeros((SIZE, SIZE), bool)
MASK[30:80, 20:70] = True
CASES = {
    "one click": [click()],
    "mask": [Prompt(0, mask=MASK)],
    "two frames, one of them later": [click(), click(3, 90, 90)],
    "correction": [click(), Prompt(3, 1, ((50, 50, 1), (100, 20, 0)), correction=True)],
}


def tracked_frames(segmenter, frames, prompts, **arguments) -> dict[int, np.ndarray]:
    return {frame.index: frame.logits for frame in segmenter.track(frames, prompts, **arguments)}


@pytest.mark.parametrize("version", ["2.0", pytest.param("2.1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_video_loop(version, case):
    reference, segmenter = both(version)
    frames = video()[:5]
    expected = reference_track(reference, segmenter.model.config, frames, CASES[case])
    ours = tracked_frames(segmenter, frames, CASES[case], chunk=5)
    errors = [relative_error(ours[index], expected[index]) for index in range(5)]
    print(f"{version}, {case}: largest relative difference by frame {[f'{error:.1e}' for error in errors]}")
    assert max(errors) <= END_TO_END
