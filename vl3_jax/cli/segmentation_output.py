"""What commands that find objects write: masks, a picture or video with the masks over it, and a JSON object."""

import argparse
import collections
import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vl3_jax.processing import overlay
from vl3_jax.processing.mask_files import MaskTable, mask_entry, save_mask
from vl3_jax.processing.output_files import empty_folder, refuse_unwritable
from vl3_jax.processing.video_frames import VideoFrames


class SegmentationOutput:
    """Writes the objects of each frame when it comes, and keeps none of them.

    Args:
      arguments: With the flags of `segmentation_flags.add_output`, `video` and `image`.
      frames: The frames of the video, or the image.

    Raises:
      InputError: The folder or the file cannot be written.
    """

    def __init__(self, arguments: argparse.Namespace, frames: VideoFrames):
        self._arguments, self._frames = arguments, frames
        self._folder = empty_folder(arguments.out)
        self._overlay = arguments.overlay and overlay.overlay_file(arguments.overlay, arguments.video is not None)
        self._stack = contextlib.ExitStack()
        self._writer: overlay.VideoWriter | None = None
        self._indices: list[int] = []
        self._seen: collections.Counter[int | str] = collections.Counter()  # frames with a mask, by object

    def __enter__(self) -> "SegmentationOutput":
        if self._arguments.json:
            self._table = self._stack.enter_context(MaskTable(self._folder))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, found: Any) -> None:
        """Writes the objects of a frame, a `TrackedFrame`."""
        masks = found.masks
        self._indices.append(found.index)
        for obj, mask, score, presence in zip(found.objects, masks, found.scores, found.presence, strict=True):
            save_mask(self._folder, obj, found.index, mask, self._arguments.format)
            self._seen[obj] += int(mask.any())
            if self._arguments.json:
                self._table.add(obj, found.index, mask_entry(mask, score, presence))
        if self._overlay:
            self._draw(found.index, masks, [str(obj) for obj in found.objects])

    def report(self, seconds: Mapping[str, float], said: Mapping[str, str] | None = None) -> None:
        """Prints what was written: with --json one JSON object, otherwise a line for each object.

        Args:
          seconds: Duration of each stage.
          said: What a language model has said, by its name in the JSON object; printed first otherwise.
        """
        if self._arguments.json:
            times = [self._frames.times[index] for index in self._indices]
            head = {**(said or {}), "frames": {"indices": self._indices, "timestamps": times}}
            head["out"] = str(self._folder)
            head |= {"overlay": str(self._overlay)} if self._overlay else {}
            head["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
            self._table.write_json(sys.stdout, head)
            return
        for text in (said or {}).values():
            print(text)
        for obj, count in self._seen.items():
            print(f"{obj}: in {count} of {len(self._indices)} frames, {self._folder / str(obj)}")

    def _draw(self, index: int, masks: Sequence[Any], names: Sequence[str]) -> None:
        image: Image.Image = overlay.draw_masks(self._frames[index], masks, names)
        if self._arguments.video is None:
            with refuse_unwritable(self._overlay, "file"):
                image.save(self._overlay)
            return
        times = self._frames.times
        if self._writer is None:
            rate = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 1.0
            writer = overlay.VideoWriter(self._overlay, (image.height, image.width), rate)
            self._writer = self._stack.enter_context(writer)
        self._writer.write(image, times[index])
