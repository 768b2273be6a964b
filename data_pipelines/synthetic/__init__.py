"""Generated questions about real images, with known answers: training and test data of the bundled model `nano`.

example("digit", "test", seed=7, number=0)              one sample: media (rendered lazily), question, answer, reference
write("folder", "test", {"digit": 200}, seed=7)         data sets on disk, in the ordinary annotation format
SyntheticSource("synthetic://train/stage2?count=100000")      the same samples as a record source, without files
evaluate("digit", answers, references)                  score, and the score of the best constant answer
"""

import importlib

_MODULE_OF = {
    "Example": "samples",
    "EVALUATED_TASKS": "registry",
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
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
