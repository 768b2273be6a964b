"""Tracking equals transformers' `sam2_video`, and does not depend on how frames and objects are grouped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import END_TO_END, MUTANT, REORDERED, relative_error

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from support.sam2_reference import (  # noqa: E402
    Sam2VideoInferenceSession,
    sam2_params,
    sam2_reference,
    sam2_tensors,
    tiny_sam2,
)
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
    return (
        np.stack([np.roll(still, 3 * i, axis=1) + rng.integers(-9, 9, still.shape) for i in range(count)])
        .clip(0, 255)
        .astype(np.uint8)
    )


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


@pytest.mark.parametrize(
    ("version", "case"),
    [
        ("2.1", "correction"),
        *(pytest.param("2.1", case, marks=pytest.mark.slow) for case in CASES if case != "correction"),
        *(pytest.param("2.0", case, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_video_loop(version, case):
    reference, segmenter = both(version)
    frames = video()[:5]
    expected = reference_track(reference, segmenter.model.config, frames, CASES[case])
    ours = tracked_frames(segmenter, frames, CASES[case], chunk=5)
    errors = [relative_error(ours[index], expected[index]) for index in range(5)]
    print(f"{version}, {case}: largest relative difference by frame {[f'{error:.1e}' for error in errors]}")
    assert max(errors) <= END_TO_END


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_backwards(version):
    reference, segmenter = both(version)
    frames, prompts = video()[:5], [click(4)]
    expected = reference_track(reference, segmenter.model.config, frames, prompts, start=4, reverse=True)
    ours = tracked_frames(segmenter, frames, prompts, start=4, reverse=True, chunk=5)
    assert list(ours) == [4, 3, 2, 1, 0]
    errors = [relative_error(ours[index], expected[index]) for index in range(5)]
    print(f"{version}, backwards: largest relative difference by frame {[f'{error:.1e}' for error in errors]}")
    assert max(errors) <= END_TO_END


def object_prompts(count: int) -> list[Prompt]:
    """Returns a prompt of each of several objects: points, boxes, a mask; in several frames; and corrections."""
    rng = np.random.default_rng(3)
    prompts = []
    for obj in range(1, count + 1):
        frame, (x, y) = obj % 3, rng.uniform(20, 100, 2)
        kinds = [click(frame, x, y, obj=obj), Prompt(frame, obj, box=(x - 20, y - 20, x + 20, y + 20))]
        prompts.append(Prompt(frame, obj, mask=MASK) if obj == 3 else kinds[obj % 2])
    prompts += [click(6, 64, 64, obj=1), Prompt(5, 2, ((30, 30, 1), (80, 80, 0)), correction=True)]
    return prompts


def stacked_logits(segmenter, frames, prompts, **arguments):
    return np.stack(list(tracked_frames(segmenter, frames, prompts, **arguments).values()))


def plain_loop(segmenter, frames, prompts, reverse=False) -> np.ndarray:
    """Tracks objects with dictionaries and lists that grow, one object and one frame at a time, [frames, objects, ...].

    The list of memories of a frame has just those that count, so that nothing needs to be masked.
    """
    model, params, config = segmenter.model, segmenter.params, segmenter.model.config
    sign, count = (-1 if reverse else 1), len(frames)
    longest = min(count, config.num_pointers) - 1
    encoded = [segmenter.encode(frame).features for frame in frames]
    results = []
    for obj in sorted({prompt.obj for prompt in prompts}):
        own, masks = [prompt for prompt in prompts if prompt.obj == obj], {}
        seen, followed = {}, {}  # memory, pointer and mask by frame
        for prompt in own:
            if not prompt.correction:
                seen[prompt.frame] = segmenter_condition(segmenter, frames[prompt.frame], prompt)
        for index in range(count)[::sign]:
            if index in seen:
                masks[index] = seen[index][2]
                continue
            maps, pointers = [], []
            cells, times = apply(model, params, "memory_positions")
            for frame, (memory, pointer, _) in seen.items():
                maps.append((memory, times[-1]))
                if sign * frame <= sign * index:
                    pointers.append((pointer, sign * (index - frame)))
            for distance in range(1, config.num_pointers):
                frame = index - sign * distance
                if frame in followed:
                    if distance < config.num_memories:
                        maps.append((followed[frame][0], times[distance - 1]))
                    if distance <= longest:
                        pointers.append((followed[frame][1], distance))
            corrections = [prompt for prompt in own if prompt.correction and prompt.frame == index]
            followed[index] = follow(segmenter, encoded[index], maps, pointers, cells, longest, corrections)
            masks[index] = followed[index][2]
        results.append(np.stack([masks[index] for index in range(count)[::sign]]))
    return np.stack(results, axis=1)


def apply(model, params, method, *arguments):
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, *arguments)


def segmenter_condition(segmenter, frame, prompt):
    tracker = ObjectTracker(segmenter.model, segmenter.params)
    tracker.prompt(frame, [prompt])
    memory, output = tracker._entries[0][prompt.frame]
    return memory, output.pointer, np.asarray(output.mask)


def follow(segmenter, features, maps, pointers, cells, longest, corrections):
    from vl3_jax.processing.object_prompts import point_arrays
    from vl3_jax.sam2.memory_attention import MemoryTokens
    from vl3_jax.sam2.sam2_model import ObjectPrompts, enlarge

    model, params, config = segmenter.model, segmenter.params, segmenter.model.config
    tokens = [memory.astype(jnp.float32) for memory, _ in maps]
    map_positions, positions = jnp.stack([cells + time for _, time in maps]), [jnp.zeros((0, config.memory_width))]
    if pointers:
        distances = np.array([[distance for _, distance in pointers]], np.float32)
        placed = apply(model, params, "pointer_positions", distances, np.float32(max(longest, 1)))[0]
        tokens += [pointer.reshape(-1, config.memory_width) for pointer, _ in pointers]
        positions += [jnp.repeat(place[None], config.tokens_per_pointer, axis=0) for place in placed]
    tokens, positions = jnp.concatenate(tokens)[None], jnp.concatenate(positions)[None]
    prompt = corrections[0] if corrections else None
    arrays = point_arrays([prompt], (SIZE, SIZE), config.image_size, 1 + max(1, len(prompt.points) if prompt else 0))
    prompts = ObjectPrompts(*arrays, np.array([prompt is None or len(prompt.points) <= 1]))
    valid = np.ones(tokens.shape[:2], bool)

    def run(module, *arrays):
        output = module.track(features, MemoryTokens(*arrays), prompts)
        memory = module.remember(
            features, enlarge(output.mask, config.image_size), output.presence, np.array([bool(prompt)])
        )
        return memory.astype(jnp.bfloat16)[0], output.pointer[0], output.mask[0]

    return apply(model, params, run, tokens, map_positions, positions, valid)


PLAIN = {  # number of frames, prompts, whether backwards
    "one conditioning frame": (5, [click()], False),
    "five": (7, [click(frame, 40 + 5 * frame) for frame in range(5)], False),
    "interleaved": (8, [click(frame, 40 + 5 * frame) for frame in (0, 3, 6)], False),
    "as many as frames": (3, [click(frame) for frame in range(3)], False),
    "one frame": (1, [click()], False),
    "backwards": (5, [click(3), click(0, 80)], True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PLAIN)
def test_scan_equals_a_plain_loop(case):
    count, prompts, reverse = PLAIN[case]
    _, segmenter = both("2.1")
    frames = video()[:count]
    expected = plain_loop(segmenter, frames, prompts, reverse)
    start = count - 1 if reverse else 0
    ours = stacked_logits(segmenter, frames, prompts, reverse=reverse, start=start, chunk=4)
    error = relative_error(ours, expected)
    print(f"{case}: largest relative difference {error:.1e}")
    assert error <= END_TO_END


@pytest.mark.slow
def test_chunks_and_garbage(monkeypatch):
    """Chunks of any length give the same masks; what unused slots of the memory hold, and padding, does not matter."""
    from vl3_jax.sam2 import memory_bank

    _, segmenter = both("2.0")
    frames, prompts = video()[:5], object_prompts(2)[:2]
    expected = stacked_logits(segmenter, frames, prompts, chunk=5)
    chunked = stacked_logits(segmenter, frames, prompts, chunk=2)
    assert relative_error(chunked, expected) <= REORDERED

    empty = memory_bank.RecentFrames.empty

    def garbage(config, objects, dtype=jnp.float32):
        bank = empty(config, objects, dtype)
        return bank.replace(memory=bank.memory + 1e3, pointer=bank.pointer - 1e3)

    monkeypatch.setattr(memory_bank.RecentFrames, "empty", garbage)
    filled = stacked_logits(segmenter, frames, prompts, chunk=2)
    np.testing.assert_array_equal(filled, chunked)

    monkeypatch.setattr(memory_bank, "_LONG", 0)  # as in large images, whose memory is padded to whole blocks
    padding = Segmenter(Sam2(segmenter.model.config, name="padded"), segmenter.params)
    assert relative_error(stacked_logits(padding, frames, prompts, chunk=2), expected) <= REORDERED


@pytest.mark.slow
def test_objects_of_a_batch_equal_single_ones():
    _, segmenter = both("2.1")
    frames, prompts = video()[:8], object_prompts(8)
    together = stacked_logits(segmenter, frames, prompts)
    order = list(dict.fromkeys(prompt.obj for prompt in sorted(prompts[:8], key=lambda prompt: prompt.frame)))
    for obj in range(1, 9):
        own = [prompt for prompt in prompts if prompt.obj == obj]
        alone = stacked_logits(segmenter, frames, own)
        error = relative_error(together[:, order.index(obj)], alone[:, 0])
        print(f"object {obj}: largest relative difference {error:.1e}")
        assert error <= END_TO_END


@pytest.mark.slow
def test_a_stream_and_a_correction_of_its_last_frame():
    """Frames that come one by one give what a whole video gives; a correction changes the frame and those after it."""
    _, segmenter = both("2.0")
    frames = video()[:4]
    whole = tracked_frames(segmenter, frames, [click()], chunk=1)
    stream = {frame.index: frame.logits for frame in segmenter.track(iter(frames), [click()])}
    for index in range(4):
        np.testing.assert_allclose(stream[index], whole[index], rtol=1e-4, atol=1e-4)
    fix = Prompt(2, 1, ((50, 50, 1), (100, 20, 0)), correction=True)
    corrected = tracked_frames(segmenter, frames, [click(), fix], chunk=1)
    tracker = segmenter.tracker(num_frames=4)
    tracker.prompt(frames[0], [click()])
    for index in range(3):
        tracker.step([frames[index]], [index])
    again = tracker.correct([fix])
    np.testing.assert_allclose(again.logits, corrected[2], rtol=1e-4, atol=1e-4)
    assert relative_error(again.logits, whole[2]) > END_TO_END
    np.testing.assert_allclose(tracker.step([frames[3]], [3])[0].logits, corrected[3], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_teacher_forced(version):
    """Over 24 frames, with the reference's memories instead of our own, each frame is equal."""
    from vl3_jax.processing.object_prompts import point_arrays
    from vl3_jax.sam2.memory_bank import ConditioningFrames, RecentFrames
    from vl3_jax.sam2.sam2_model import ObjectOutput, ObjectPrompts
    from vl3_jax.sam2.tracking import FrameInputs, track_frames

    reference, segmenter = both(version, 1.0)
    model, config = segmenter.model, segmenter.model.config
    frames = video(24)
    session = Sam2VideoInferenceSession(reference_pixels(frames, config), SIZE, SIZE, dtype=torch.float32)
    row = session.obj_id_to_idx(1)
    points = {"point_coords": torch.tensor([[[[40.0, 60.0]]]]), "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
    session.add_point_inputs(row, 0, points)
    session.obj_with_new_inputs = [1]
    first = reference(session, frame_idx=0)
    stored = session.output_dict_per_obj[0]["cond_frame_outputs"][0]

    def as_memory(entry):
        return jnp.asarray(entry["maskmem_features"].float().numpy()).transpose(1, 0, 2).astype(jnp.bfloat16)

    mask, logit = first.pred_masks.numpy(), first.object_score_logits.numpy()
    output = ObjectOutput(
        mask, np.ones((1, 1), np.float32), logit[None], stored["object_pointer"].numpy().reshape(1, 1, -1)
    )
    conditioning = ConditioningFrames(
        as_memory(stored)[:, None], output, np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
    )
    recent = RecentFrames.empty(config, 1)
    nothing = ObjectPrompts(*point_arrays([None], (SIZE, SIZE), SIZE, 2), np.array([True]))
    errors = []
    for index in range(1, 24):
        theirs = reference(session, frame_idx=index)
        inputs = FrameInputs(np.int32(index), np.array(True), nothing, np.zeros(1, bool))
        arguments = conditioning, recent, jax.tree.map(lambda x: x[None], inputs), np.float32(15)
        _, ours = track_frames(model, segmenter.params, frames[index : index + 1], *arguments)
        errors.append(relative_error(ours.mask[0, 0], theirs.pred_masks[0, 0].numpy()))
        entry = session.output_dict_per_obj[0]["non_cond_frame_outputs"][index]
        pointer = entry["object_pointer"].numpy().reshape(1, -1)
        recent = recent.push(as_memory(entry), pointer, np.ones(1, bool))
    print(f"{version}, teacher-forced: largest relative difference {max(errors):.1e}")
    assert max(errors) <= END_TO_END


@pytest.mark.slow
def test_memory_and_time_do_not_grow():
    """Over 600 frames of a stream, memory grows by less than 5 % from frame 50 on, and frames take no longer."""
    import time

    import psutil

    _, segmenter = both("2.0")
    frames, process, sizes, times = video(), psutil.Process(), [], []
    start = time.perf_counter()
    for frame in segmenter.track((frames[i % len(frames)] for i in range(600)), [click()]):
        sizes.append(process.memory_info().rss)
        times.append(time.perf_counter() - start)
        assert frame.logits.shape == (1, SIZE // 4, SIZE // 4)
    seconds = np.diff(times)
    print(
        f"resident {sizes[50] / 2**20:.0f} MiB at frame 50, {sizes[-1] / 2**20:.0f} at the end; ms a frame "
        f"{1e3 * np.median(seconds[50:150]):.0f} and {1e3 * np.median(seconds[-100:]):.0f}"
    )
    assert sizes[-1] < 1.05 * sizes[50]
    assert np.median(seconds[-100:]) < 2 * np.median(seconds[50:150])


def mutations() -> dict:
    """Returns what is replaced by what, by the name of a deliberate mistake."""
    from vl3_jax.inference import object_tracker
    from vl3_jax.processing import resampling
    from vl3_jax.sam2 import hiera, memory_attention, memory_bank, sam2_model

    positions, points = sam2_model.Sam2.memory_positions, object_tracker.point_arrays
    push = memory_bank.RecentFrames.push

    def flipped(*arguments):
        coordinates, labels = points(*arguments)
        return coordinates, np.where(labels == 1, 0, labels)

    def shifted(*arguments):
        coordinates, labels = points(*arguments)
        return coordinates - 0.5, labels

    def backwards(self, *arguments):
        new = push(self, *arguments)
        return new.replace(memory=jnp.roll(new.memory, 1, axis=1))

    linear = lambda size, target: resampling.bilinear_matrix(size, target)  # noqa: E731
    times = lambda module: (positions(module)[0], positions(module)[1][::-1])  # noqa: E731
    sine, cells = sam2_model.sine_grid, memory_attention.cell_coordinates
    return {
        "linear for bicubic interpolation of positions": (hiera, "bicubic_matrix", linear),
        "columns before rows in the sine encoding": (sam2_model, "sine_grid", lambda *a: sine(*a).swapaxes(0, 1)),
        "rows before columns in rotary positions": (memory_attention, "cell_coordinates", lambda n: cells(n)[:, ::-1]),
        "rows of time in the other order": (sam2_model.Sam2, "memory_positions", times),
        "memories in another order than their times": (memory_bank.RecentFrames, "push", backwards),
        "background for foreground": (object_tracker, "point_arrays", flipped),
        "corners of points and not their centres": (
            object_tracker,
            "point_arrays",
            lambda *a: (points(*a)[0] - 0.5, points(*a)[1]),
        ),
    }


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [*mutations(), "prompted memories are not binarised"])
def test_a_deliberate_mistake_is_detected(mutant, monkeypatch):
    reference, segmenter = both("2.1", 1.0)
    frames, config = video()[:4], segmenter.model.config
    expected = reference_track(reference, config, frames, [click()])
    if mutant in mutations():
        monkeypatch.setattr(*mutations()[mutant])
    else:
        config = dataclasses.replace(config, binarize_prompted_memory=False)
    wrong = Segmenter(Sam2(config, name="mutant " + mutant), segmenter.params)  # another name: it is compiled anew
    ours = tracked_frames(wrong, frames, [click()], chunk=4)
    error = relative_error(ours[3], expected[3])
    print(f"{mutant}: relative difference {error:.1e}")
    assert error > MUTANT
