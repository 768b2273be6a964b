"""The model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval) that asks vl3_jax, for the tasks defined there.

    python -m lmms_eval --model vl3_jax --model_args model=nano,max_frames=64 --batch_size 8 --tasks mme

Importing this module needs lmms-eval, which finds it by an entry point of this package (`lmms_eval_plugin`).
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.model import lmms

from vl3_jax.evaluation.benchmark import Benchmark, Item
from vl3_jax.evaluation.prompts import questions_of
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.evaluation.runner import Runner
from vl3_jax.inference.open_model import load

logger = logging.getLogger(__name__)

_LOADING = ("dtype", "quantize", "kv_cache", "token")


class VL3JaxModel(lmms):
    """A checkpoint of any format behind the interface of lmms-eval; its tasks hand over whole conversations."""

    is_simple = False

    def __init__(self, model: str, batch_size: int | str = 8, device: Any = None, **settings: Any):
        """Loads the checkpoint.

        Args:
          model: Whatever `vl3_jax.load` takes.
          batch_size: Number of requests that are answered side by side.
          device: Ignored; JAX chooses it.
          **settings: `dtype`, `quantize`, `kv_cache` and `token` of `vl3_jax.load`, and those of `EvalProtocol`.

        Raises:
          InputError: The checkpoint cannot be loaded, or a setting has a value that it cannot have.
        """
        super().__init__()
        loading = {name: settings.pop(name) for name in _LOADING if name in settings}
        settings.pop("max_batch_size", None)
        protocol = EvalProtocol(**settings)
        self._runner = Runner(load(model, **loading), protocol, int(batch_size))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers requests side by side, with greedy decoding; returns the texts up to their stop strings in order.

        A request whose media cannot be read is logged, and its answer is empty.
        """
        tasks: dict[tuple[str, int | None], _Conversations] = {}
        questions = []
        for number, request in enumerate(requests):
            _, messages_of, generation, document, task, split = request.args
            conversation = [_message(message) for message in messages_of(self.task_dict[task][split][document])]
            media = [part for message in conversation for part in message["content"] if part["type"] != "text"]
            kind = "video" if any(part["type"] == "video" for part in media) else "image"
            if generation.get("temperature") or generation.get("num_beams", 1) > 1:
                logger.warning("%s asks for samples or beams; decoding is greedy here", task)
            limit = generation.get("max_new_tokens")
            benchmark = tasks.setdefault((kind, limit), _Conversations(kind, limit))
            item = _Conversation(str(number), [_described(part) for part in media], "", {}, conversation=conversation)
            questions += questions_of(benchmark, [item], {})
        answers = [""] * len(requests)
        for record in self._runner.ask(questions):
            number = int(record["id"].rpartition("/")[2])
            if record["answer"] is None:
                logger.error("request %d of lmms-eval: %s", number, record["error"])
            answers[number] = _until(record["answer"] or "", requests[number].args[2].get("until"))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vl3_jax generates answers; choose a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("vl3_jax answers single rounds; choose a task whose output_type is generate_until")


class _Conversations(Benchmark):
    """Requests of one kind of media and one limit of new tokens; lmms-eval scores their answers."""

    name = title = "lmms_eval"
    rows, size = (), 0
    source, layout, licence = "lmms-eval", "", "that of the task"

    def __init__(self, kind: str, max_new_tokens: int | None):
        super().__init__()
        self.kind, self.max_new_tokens = kind, max_new_tokens

    def items(self, data):
        raise NotImplementedError

    def verdict(self, response, reference, scoring):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class _Conversation(Item):
    """A request.

    Attributes:
      conversation: All of its messages.
    """

    conversation: Sequence[dict[str, Any]] = ()

    def messages(self, frame_times):
        return list(self.conversation)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": [_part(part) for part in message["content"]]}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    times = {ours: part.get(theirs) for ours, theirs in (("start", "start_time"), ("end", "end_time"))}
    return {"type": part["type"], part["type"]: part["url"]} | {k: v for k, v in times.items() if v is not None}


def _described(part: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part with what identifies its source within this process, if that is no path."""
    source = part[part["type"]]
    return {**part, part["type"]: source if isinstance(source, str) else f"object {id(source)}"}


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Returns the text in front of the first stop string."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text.strip()
