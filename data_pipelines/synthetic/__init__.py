"""Questions over real pixels with known answers, without end: what the default model learns from and is judged by.

example("digit", "test", seed=7, number=0)              one sample, not drawn yet: media, question, answer, truth
write("folder", "test", {"digit": 200}, seed=7)         data sets on disk, in the ordinary annotation format
SyntheticSource("synthetic://train/stage2?count=100000")      the same as a source for training, without files
evaluate("digit", answers, truths)                      score beside what a constant answer would reach
"""

import importlib

_HOME = {
    "Example": "samples",
    "JUDGED": "registry",
    "STAGES": "stages",
    "SyntheticSource": "source",
    "TASKS": "registry",
    "evaluate": "scoring",
    "example": "registry",
    "examples": "registry",
    "open_image_pool": "image_pool",
    "score": "scoring",
    "shares": "stages",
    "sources": "stages",
    "train_tokenizer": "tokenizer",
    "write": "dataset_writer",
    "write_tokenizer": "tokenizer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
