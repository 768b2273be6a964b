"""The model class of lmms-eval: through the installed package, or else through a stand-in for its interface."""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from support.checkpoints import write_small_checkpoint
from support.media import MEDIA

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
VIDEO = str(MEDIA / "videos" / "city_night.mp4")
pytestmark = pytest.mark.usefixtures("fast_compile")


class StandIn:
    """What lmms-eval's `lmms` gives its models."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}


def stand_in(monkeypatch):
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models", "lmms_eval.models.registry_v2")
    modules = {name: ModuleType(name) for name in names}
    modules["lmms_eval.api.model"].lmms = StandIn
    modules["lmms_eval.models.registry_v2"].ModelManifest = lambda name, chat_class_path: SimpleNamespace(
        model_id=name, chat_class_path=chat_class_path
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def model_class(monkeypatch):
    """The class as lmms-eval finds it."""
    from vl3_jax.evaluation.lmms_eval_plugin import manifest

    monkeypatch.delitem(sys.modules, "vl3_jax.evaluation.lmms_eval_model", raising=False)
    if INSTALLED:
        from support import reference  # noqa: F401  (declares operators that torchvision may lack)

        registry = importlib.import_module("lmms_eval.models").MODEL_REGISTRY_V2
        registry.register_manifest(manifest(), overwrite=True)
        return registry.get_model_class("vl3_jax")
    stand_in(monkeypatch)
    found = manifest()
    module, name = found.chat_class_path.rsplit(".", 1)
    assert found.model_id == "vl3_jax"
    return getattr(importlib.import_module(module), name)


def messages(document):
    return [{"role": "user", "content": [*document["media"], {"type": "text", "text": document["question"]}]}]


def request(number, **generation):
    arguments = ("", messages, {"until": ["\n\n"], "max_new_tokens": 5, **generation}, number, "colors", "test")
    return SimpleNamespace(args=arguments)


def test_requests_of_its_tasks_are_answered(model_class, tmp_path, caplog):
    checkpoint = write_small_checkpoint(tmp_path / "small")
    model = model_class(model=str(checkpoint), batch_size=4, device="cpu", max_visual_tokens=64)
    assert not model.is_simple
    image = Image.fromarray(np.full((56, 56, 3), 200, np.uint8))
    video = {"type": "video", "url": VIDEO, "start_time": None, "end_time": 1.0}
    missing = {"type": "image", "url": str(tmp_path / "gone.png")}
    media = [[], [{"type": "image", "url": image}], [video], [video], [missing]]
    documents = [{"media": parts, "question": f"What is {n}?"} for n, parts in enumerate(media)]
    model.task_dict = {"colors": {"test": documents}}
    requests = [request(number, max_new_tokens=3 + number) for number in range(len(documents))]
    answers = model.generate_until(requests)
    assert len(answers) == len(documents)
    assert answers[4] == ""
    assert "request 4" in caplog.text
    assert "gone.png" in caplog.text
    alone = [model.generate_until([one])[0] for one in requests]
    assert alone == answers
    assert any(answers[:4])
    stopped = model.generate_until([request(0, max_new_tokens=3, until=[answers[0][:1] or "x"])])
    assert stopped == [""]
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood(requests)
