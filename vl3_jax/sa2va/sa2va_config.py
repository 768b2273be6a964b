"""Configuration of a model that chats and draws masks."""

import dataclasses

from vl3_jax.model.config import ModelConfig
from vl3_jax.sam2.sam2_config import Sam2Config, sa2va_settings


@dataclasses.dataclass(frozen=True)
class Sa2vaConfig:
    """The two halves, which meet in one vector for each object.

    Attributes:
      chat: The language model.
      sam2: SAM-2 with the settings that Sa2VA decodes and tracks with.
    """

    chat: ModelConfig
    sam2: Sam2Config

    @classmethod
    def joined(cls, chat: ModelConfig, sam2: Sam2Config) -> "Sa2vaConfig":
        """Returns the configuration of two models; whether SAM-2 is 2.0 or 2.1 stays as it is."""
        version = {"pointer_time": sam2.pointer_time, "occlusion": sam2.occlusion}
        return cls(chat, dataclasses.replace(sa2va_settings(sam2), **version))

    @property
    def stock_sam2(self) -> Sam2Config:
        """SAM-2 with the settings of its own authors, which Sa2VA-i tracks with."""
        changes = {"mask_absent_objects": True, "binarize_prompted_memory": True, "two_step_masks": False}
        return dataclasses.replace(self.sam2, **changes)
