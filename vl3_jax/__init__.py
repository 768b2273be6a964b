"""VideoLLaMA3 for JAX and TPU.

    import vl3_jax as vl3
    model = vl3.load("checkpoint")
    print(model.chat("What is the cat doing?", videos=["cat.mp4"]))

Importing the package touches no device; what needs jax is imported when it is first used.
"""

from typing import TYPE_CHECKING

from vl3_jax import boxes, times
from vl3_jax.errors import InputError

if TYPE_CHECKING:
    from vl3_jax.batch.answering import answer_requests
    from vl3_jax.inference.chat_model import ChatModel, GenerationOutput
    from vl3_jax.inference.open_model import load

__all__ = ["ChatModel", "GenerationOutput", "InputError", "answer_requests", "boxes", "load", "times"]


def __getattr__(name: str):
    if name in __all__:
        from vl3_jax.batch import answering
        from vl3_jax.inference import chat_model, open_model

        modules = {"load": open_model, "answer_requests": answering}
        return getattr(modules.get(name, chat_model), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
