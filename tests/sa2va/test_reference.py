"""Answers with masks equal those of transformers' VideoLLaMA3 and `sam2_video`, joined as Sa2VA joins them."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file

import vl3_jax as vl3
from support.checkpoints import config_with_real_vocabulary, write_reference_checkpoint
from support.dictated import Dictated
from support.sam2_folders import write_sam2_folder
from support.tolerances import END_TO_END, GREEDY_MARGIN, relative_error
from vl3_jax.checkpoint import Sa2vaInitSource, write_hf
from vl3_jax.processing.object_prompts import Prompt
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.tokenizer import MASK
from vl3_jax.sa2va.templates import GROUNDED_CAPTION

pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
from support.reference import model_inputs, reference_model, torch
from support.sam2_reference import Sam2VideoInferenceSession, sam2_reference, sam2_tensors, tiny_sam2

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compile")]
SIZE = 128  # of the input of the tiny SAM-2: no resizing hides a difference
SETTINGS = {"max_new_tokens": 6, "max_visual_tokens": 64}


def frames(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (SIZE, SIZE, 3))
    moved = (np.roll(still, 3 * i, axis=1) + rng.integers(-9, 9, still.shape) for i in range(count))
    return [frame.clip(0, 255).astype(np.uint8) for frame in moved]


class Reference:
    """The two models of transformers and the layers between them."""

    def __init__(self, chat, sam2, config, joint: dict[str, np.ndarray]):
        self.chat, self.sam2, self._config = chat, sam2, config
        self._joint = {name: torch.tensor(value) for name, value in joint.items()}
        self._vector = None
        encode, remember = sam2.prompt_encoder.forward, sam2._encode_new_memory

        def with_vector(**arguments):
            sparse, dense = encode(**arguments)
            if self._vector is not None:
                sparse = torch.cat([sparse, self._vector.reshape(1, 1, 1, -1)], dim=2)
            return sparse, dense

        def not_binarised(*arguments, **keywords):
            return remember(*arguments, **{**keywords, "is_mask_from_pts": False})

        sam2.prompt_encoder.forward = with_vector
        self._soft_memory, self._stock_memory = not_binarised, remember

    def hidden(self, sample, answer):
        """Returns the hidden states of an answer, and the logits that predict each of its tokens."""
        count = sample.num_vision_tokens
        inputs = model_inputs([Sample(np.zeros(count), np.ones(count, bool), sample.visuals)])
        ids = torch.tensor([[*sample.tokens.tolist(), *answer]])
        with torch.no_grad():
            pixels = (inputs[name] for name in ("pixel_values", "image_grid_thw", "image_merge_sizes"))
            features = torch.cat(self.chat.model.get_image_features(*pixels).pooler_output)
            embedded = self.chat.get_input_embeddings()(ids)
            embedded[0, np.flatnonzero(sample.is_vision)] = features[torch.tensor(sample.vision_order).long()]
            states = self.chat.model.language_model(inputs_embeds=embedded).last_hidden_state[0]
            start = len(sample.tokens)
            return states[start:].numpy(), self.chat.lm_head(states[start - 1 : -1]).numpy()

    def vectors(self, hidden: np.ndarray) -> np.ndarray:
        weights = self._joint
        inner = torch.relu(torch.tensor(hidden) @ weights["0.weight"].T + weights["0.bias"])
        return (inner @ weights["2.weight"].T + weights["2.bias"]).numpy()

    def track(self, images, vector, key_frames, correction=None) -> list[np.ndarray]:
        """Tracks one object from the frames that a vector prompts; returns its low-resolution logits."""
        self.sam2._encode_new_memory = self._soft_memory
        session, row = self._session(images)
        for frame in key_frames:
            points = {"point_coords": torch.zeros(1, 1, 1, 2), "point_labels": -torch.ones(1, 1, 1, dtype=torch.int32)}
            session.add_point_inputs(row, frame, points)
            session.obj_with_new_inputs = [1]
            self._vector = torch.tensor(vector)
            self.sam2(session, frame_idx=frame)
            self._vector = None
        found = self._propagate(session)
        if correction is not None:
            coordinates = torch.tensor([[[point[:2] for point in correction.points]]], dtype=torch.float32)
            labels = torch.tensor([[[point[2] for point in correction.points]]], dtype=torch.int32)
            session.add_point_inputs(row, correction.frame, {"point_coords": coordinates, "point_labels": labels})
            session.obj_with_new_inputs = [1]
            found[correction.frame] = self.sam2(session, frame_idx=correction.frame).pred_masks[0, 0].numpy()
        return found

    def track_masks(self, images, masks: dict[int, np.ndarray]) -> list[np.ndarray]:
        """Tracks one object from masks with the stock model."""
        self.sam2._encode_new_memory = self._stock_memory
        session, row = self._session(images)
        for frame, mask in masks.items():
            session.add_mask_inputs(row, frame, torch.tensor(mask)[None, None].float())
            session.obj_with_new_inputs = [1]
            self.sam2(session, frame_idx=frame)
        return self._propagate(session)

    def _session(self, images):
        pixels = (np.stack(images).astype(np.float32) / 255 - self._config.image_mean) / self._config.image_std
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
        session = Sam2VideoInferenceSession(pixels, SIZE, SIZE, dtype=torch.float32)
        return session, session.obj_id_to_idx(1)

    def _propagate(self, session) -> list[np.ndarray]:
        run = self.sam2.propagate_in_video_iterator(session, start_frame_idx=0)
        return [output.pred_masks[0, 0].numpy() for output in run]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference, and our model of the same weights."""
    folder = tmp_path_factory.mktemp("models")
    chat, config = reference_model(config_with_real_vocabulary()), tiny_sam2("2.0", memory_layers=1)
    sam2 = sam2_reference(config)
    write_reference_checkpoint(folder / "vl3", chat)
    write_sam2_folder(folder / "sam2", config, **sam2_tensors(sam2))
    write_hf(Sa2vaInitSource(folder / "vl3", folder / "sam2"), folder / "sa2va", "native", quiet=True)
    tensors = load_file(folder / "sa2va" / "model.safetensors")
    joint = {name.removeprefix("text_hidden_fcs."): tensors[name] for name in tensors if name.startswith("text_hid")}
    return Reference(chat, sam2, config, joint), vl3.load(folder / "sa2va")


def segmented(pair, **request):
    """Asks for masks in place of what the model says most, and compares the answer with the reference.

    Returns:
      Our result, and the reference's vectors of its objects.
    """
    reference, model = pair
    said = model.segment("the red car", **request, **SETTINGS).token_ids
    place, embedding = model.processor.tokenizer.id_of(MASK), model.engine.params["llm"]["embed"]
    row = 1.05 * embedding["embedding"][max(said, key=said.count)]
    embedding["embedding"] = embedding["embedding"].at[place].set(row)
    with torch.no_grad():
        reference.chat.get_input_embeddings().weight[place] = torch.tensor(np.asarray(row))
    model.engine.forget()
    result = model.segment("the red car", **request, **SETTINGS)
    compare_text(reference, result.processed.sample, result.token_ids)
    return result, compared_vectors(pair, result)


def compare_text(reference: Reference, sample, ids) -> None:
    """Compares the tokens of an answer with the likeliest ones of the reference."""
    _, logits = reference.hidden(sample, ids)
    for token, row in zip(ids, logits, strict=True):
        if np.diff(np.sort(row)[-2:])[0] >= GREEDY_MARGIN:
            assert token == row.argmax()


def compared_vectors(pair, result) -> np.ndarray:
    """Compares the vectors of the objects of an answer with those of the reference, and returns these."""
    reference, model = pair
    hidden, _ = reference.hidden(result.processed.sample, result.token_ids)
    places = np.flatnonzero(np.array(result.token_ids) == model.processor.tokenizer.id_of(MASK))
    assert len(places), "the answer has objects"
    vectors = reference.vectors(hidden[places])
    assert relative_error(result.vectors, vectors) <= END_TO_END
    return vectors


def compare_description(pair, image, mask: np.ndarray, theirs: np.ndarray) -> None:
    """Compares what is said of a region with the reference.

    Args:
      pair: The reference and our model.
      image: The image.
      mask: The region.
      theirs: The region as the reference draws it; its vision tokens are those at which a nearest resize has it.
    """
    reference, model = pair
    seen, submit = [], model.engine.submit
    model.engine.submit = lambda request: seen.append(submit(request)) or seen[-1]
    try:
        model.describe(image, [mask], **SETTINGS)
    finally:
        model.engine.submit = submit
    sample, ids = seen[0].request.sample, seen[0].tokens
    _, *sides = sample.visuals[0].grid
    grid = [side // 2 for side in sides]
    cells = torch.nn.functional.interpolate(torch.tensor(theirs)[None, None].float(), grid, mode="nearest")
    assert sample.repeated.tolist() == np.flatnonzero(cells).tolist()
    assert 4 <= len(sample.repeated) <= 256, "neither filled up nor thinned"
    compare_text(reference, sample, ids)


def enlarged(logits: np.ndarray) -> np.ndarray:
    """Returns low-resolution logits at the size of the image."""
    size = {"size": (SIZE, SIZE), "mode": "bilinear", "align_corners": False}
    return torch.nn.functional.interpolate(torch.tensor(logits)[None, None], **size)[0, 0].numpy()


def test_an_image(pair):
    reference, _ = pair
    (image,) = frames(1)
    result, vectors = segmented(pair, image=image)
    (frame,) = result.frames()
    for ours, vector in zip(frame.logits, vectors, strict=True):
        assert relative_error(ours, reference.track([image], vector, [0])[0]) <= END_TO_END


@pytest.mark.parametrize("corrected", [False, True])
def test_a_video(pair, corrected):
    (reference, _), images = pair, frames(7)
    result, vectors = segmented(pair, video=images)
    click = Prompt(5, 1, ((50, 50, 1), (100, 20, 0)), correction=True) if corrected else None
    ours = [frame.logits[0] for frame in result.frames([click] if click else [])]
    expected = reference.track(images, vectors[0], range(5), click)
    last = 6 if corrected else 7  # what follows a correction is not tracked again by the reference
    for index in range(last):
        assert relative_error(ours[index], expected[index]) <= END_TO_END, index


def test_a_video_in_the_other_way(pair):
    (reference, _), images = pair, frames(6)
    result, vectors = segmented(pair, video=images, key_frames=3, mode="sa2va_i")
    drawn = {frame: reference.track([images[frame]], vectors[0], [0])[0] for frame in (0, 2, 5)}
    expected = reference.track_masks(images, {frame: enlarged(logits) > 0 for frame, logits in drawn.items()})
    ours = [frame.logits[0] for frame in result.frames()]
    for index in range(6):
        assert relative_error(ours[index], expected[index]) <= END_TO_END, index


def test_a_grounded_caption(pair, monkeypatch):
    """Phrases and their masks. The words are dictated: random weights do not put tags in order."""
    (reference, model), (image,) = pair, frames(1)
    said = "A <p> red car </p> [SEG] stands behind <p> two dogs </p> [SEG] and <p> a  cat </p> [SEG] ."
    ids = model.processor.tokenizer.encode(said, special=True)
    monkeypatch.setattr(model, "constraint", lambda settings: Dictated(ids))
    limits = {"max_new_tokens": len(ids), "max_visual_tokens": 64}
    result = model.segment(GROUNDED_CAPTION, image=image, verbatim=True, **limits)
    assert result.token_ids == ids
    assert result.grounded.caption == " ".join(re.sub(r"\[SEG\]|</?p>", "", said).split())
    assert result.names == [" ".join(phrase.split()) for phrase in re.findall(r"<p>(.*?)</p> \[SEG\]", said)]
    vectors = compared_vectors(pair, result)
    (frame,) = result.frames()
    for ours, vector in zip(frame.logits, vectors, strict=True):
        assert relative_error(ours, reference.track([image], vector, [0])[0]) <= END_TO_END


def test_a_region_is_described(pair):
    (image,) = frames(1)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[20:90, 30:100] = True
    compare_description(pair, image, mask, mask)


def test_what_was_drawn_is_described(pair):
    """The loop: a text gives a mask, which is the region of the next question."""
    (reference, _), (image,) = pair, frames(1)
    result, vectors = segmented(pair, image=image)
    theirs = enlarged(reference.track([image], vectors[0], [0])[0]) > 0
    assert (result.masks[0] == theirs).mean() > 0.999, "only where logits are nearly 0"
    compare_description(pair, image, result.masks[0], theirs)
