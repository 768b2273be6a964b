"""Writes what the model sees as pictures: its images and frames, joined from the patches that the model gets."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.output_files import empty_folder, refuse_unwritable
from vl3_jax.processing.packed_batch import Visual, block_coordinates
from vl3_jax.processing.patchify import unpatchify


def save_frames(
    visuals: Sequence[Visual],
    selections: Sequence[FrameSelection | None],
    folder: str | os.PathLike,
    with_kept: bool = False,
) -> list[str]:
    """Writes each image and each frame of a prompt as a PNG file, with exactly the pixels that the model gets.

    An image is `00.png`, where 00 is its place among the images and videos of the prompt. A frame of a video is
    `00_0003_12.00.png`: the place of the video, that of the frame among the frames shown, and its label in seconds if
    it has one.

    Args:
      visuals: The images and videos of the prompt, in order of appearance.
      selections: The selected frames of each video; None for an image.
      folder: Folder to write to; created if it does not exist.
      with_kept: Whether each frame of a video has a second picture, `..._kept.png`, with its pruned blocks dimmed.

    Returns:
      The paths of the pictures in order, those of the second kind left out.

    Raises:
      InputError: The folder is not empty or cannot be written.
    """
    target = empty_folder(folder)
    paths = []
    for number, (visual, selection) in enumerate(zip(visuals, selections, strict=True)):
        names = _names(f"{number:02}", visual, selection)
        paths += [_write(target / f"{name}.png", frame) for name, frame in zip(names, frames_of(visual), strict=True)]
        if with_kept and selection is not None:
            for name, frame in zip(names, frames_of(visual, dim_pruned=True), strict=True):
                _write(target / f"{name}_kept.png", frame)
    return paths


def frames_of(visual: Visual, dim_pruned: bool = False) -> Iterator[np.ndarray]:
    """Yields each frame as [h, w, 3] uint8, joined from its patches.

    Args:
      visual: An image or a video.
      dim_pruned: Whether to dim the blocks whose token was pruned.
    """
    frames, rows, columns = visual.grid
    patch_hw = block_coordinates(rows, columns, visual.merge)
    kept = visual.keep if dim_pruned else np.ones_like(visual.keep)
    kept = kept.repeat(visual.merge**2).reshape(frames, -1)
    for patches, patch_kept in zip(visual.patches.reshape(frames, rows * columns, -1), kept, strict=True):
        yield unpatchify(patches, patch_hw, patch_kept)


def _names(number: str, visual: Visual, selection: FrameSelection | None) -> list[str]:
    """Returns the name of the picture of each frame, without its ending."""
    if selection is None:
        return [number]
    times = selection.timestamps
    labels = [""] * visual.grid[0] if times is None else [f"_{time:.2f}" for time in times]
    return [f"{number}_{frame:04}{label}" for frame, label in enumerate(labels)]


def _write(path: pathlib.Path, pixels: np.ndarray) -> str:
    with refuse_unwritable(path):
        Image.fromarray(pixels).save(path, compress_level=1)
    return str(path)
