"""Counts what is read from records: media, turns by role, keys that nothing reads."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.sample_errors import readable

_MAX_KEYS = 20  # listed


@dataclasses.dataclass
class RecordCounts:
    """What was read from good records.

    Attributes:
      samples: Number of records.
      images: Number of images.
      videos: Number of videos.
      learned: Number of turns whose text is learned, by role.
      shown: Number of turns that are shown and not learned, by role.
      left_out: Number of turns before the first question, which are left out, by role.
      unknown_keys: In how many records each key occurs that nothing reads.
    """

    samples: int = 0
    images: int = 0
    videos: int = 0
    learned: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    shown: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unknown_keys: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, others: Iterable["RecordCounts"]) -> None:
        """Adds the counts of other records."""
        for other in others:
            for field in dataclasses.fields(self):
                mine, more = getattr(self, field.name), getattr(other, field.name)
                if isinstance(mine, collections.Counter):
                    mine.update(more)
                else:
                    setattr(self, field.name, mine + more)

    def to_json(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        return {
            "samples": self.samples,
            "images": self.images,
            "videos": self.videos,
            "turns": {"learned": dict(self.learned), "shown": dict(self.shown), "left_out": dict(self.left_out)},
            "unknown_keys": {readable(key): count for key, count in _by_count(self.unknown_keys)},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RecordCounts":
        """Returns the counts that `to_json` gave."""
        counters = {name: collections.Counter(count) for name, count in values["turns"].items()}
        numbers = {name: values[name] for name in ("samples", "images", "videos")}
        return cls(**numbers, **counters, unknown_keys=collections.Counter(values["unknown_keys"]))

    def lines(self) -> list[str]:
        """Returns the counts as lines of text."""
        lines = [f"{self.samples:,} samples read, with {self.images:,} images and {self.videos:,} videos"]
        turns = {"learned": self.learned, "shown": self.shown, "left out before the first question": self.left_out}
        listed = [f"{title}: {_listed(counter)}" for title, counter in turns.items() if counter]
        if listed:
            lines.append("turns " + "; ".join(listed))
        if self.unknown_keys:
            lines.append(f"keys that nothing reads: {_listed(self.unknown_keys)}")
        return lines


def _listed(counter: collections.Counter[str]) -> str:
    named = [f"{readable(name)} {count:,}" for name, count in _by_count(counter)[:_MAX_KEYS]]
    more = len(counter) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _by_count(counter: collections.Counter[str]) -> list[tuple[str, int]]:
    """Returns the names with the largest counts first; equal ones by name, so that workers do not change the order."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))
