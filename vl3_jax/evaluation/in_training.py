"""Benchmarks of a model that is being trained, in the process of the training."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks, results
from vl3_jax.evaluation.benchmark import OVERALL, Scoring
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.evaluation.prompts import media_groups, questions_of
from vl3_jax.evaluation.runner import Runner
from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.engine import Engine
from vl3_jax.inference.generation_config import GenerationConfig
from vl3_jax.model import VideoLLaMA3, param_axes
from vl3_jax.parallel import processes
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings
from vl3_jax.processing.processor import Processor
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.storage.shards import Shard
from vl3_jax.training.lora import merge_adapters
from vl3_jax.training.run_config import EvalConfig


class TrainingBenchmarks:
    """The benchmarks that a run asks for, loaded before the training begins.

    Several processes ask a part of the questions each, on their own devices, to which the parameters are copied.

    Args:
      config: Names the benchmarks.

    Raises:
      InputError: A benchmark is unknown or of masks, or its data is missing.
    """

    def __init__(self, config: EvalConfig):
        selection = QuestionSelection(count=config.questions) if config.questions else None
        self._items = {}
        for benchmark in benchmarks.find(benchmarks.listed(config.tasks), selection):
            if benchmark.draws or benchmark.shows_regions:
                raise InputError(f"eval.tasks: {benchmark.task} takes a Sa2VA; leave it out, and ask by `vl3 eval`")
            items = benchmark.load(config.data or None)
            self._items[benchmark] = items[: config.questions or None]
            if not items:
                raise InputError(f"eval.tasks: {benchmark.task} has no questions; `vl3 eval --check-data` says why")

    def measure(
        self, model: VideoLLaMA3, params: Any, mesh: Mesh, files: str, processor_config: ProcessorConfig
    ) -> dict[str, float]:
        """Returns the scores of the benchmarks by name, as they stand in the tables; every process must call this.

        Args:
          model: The model's structure and numerics.
          params: Its parameters, with adapters if it has any.
          mesh: The mesh over which they are sharded.
          files: Folder with the tokenizer and, if there are any, generation settings.
          processor_config: Settings of the processor.
        """
        mesh, params = local_params(model, params, mesh)
        processor = Processor.from_folder(files)
        processor = Processor(processor.tokenizer, processor_config)
        generation = GenerationConfig.read(files, processor.tokenizer.stop_ids)
        questions = [
            question for benchmark, items in self._items.items() for question in questions_of(benchmark, items, {})
        ]
        shard = Shard(jax.process_index() + 1, jax.process_count())
        own = [question for group in shard.of(media_groups(questions)) for question in group]
        with jax.set_mesh(mesh):
            engine = Engine(model, params, generation.stop_ids, mesh=mesh)
            records = list(Runner(ChatModel(engine, processor, generation)).ask(own))
        items = {benchmark.task: items for benchmark, items in self._items.items()}
        return _scores(results.score_tasks(processes.gathered(records), Scoring(), items))


def local_params(model: VideoLLaMA3, params: Any, mesh: Mesh) -> tuple[Mesh, Any]:
    """Returns the parameters without adapters, and their mesh: that of this process where there are several.

    Args:
      model: The model.
      params: Parameters, sharded over all devices of all processes.
      mesh: The mesh of all devices.
    """
    params = jax.jit(merge_adapters)(params) if _has_adapters(params) else params
    if jax.process_count() == 1:
        return mesh, params
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    places = shardings(params, param_axes(model.config), mesh)

    def moved(leaf: jax.Array, place: jax.sharding.Sharding) -> jax.Array:  # one leaf at a time, to spare memory
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(whole, place)

    return mesh, jax.tree.map(moved, params, places)


def _has_adapters(params: Any) -> bool:
    return jax.tree.structure(params) != jax.tree.structure(jax.eval_shape(merge_adapters, params))


def _scores(scored: Mapping[str, results.TaskResult]) -> dict[str, float]:
    """Returns the value of each row of the tables, by its name; those that the task has none of, by the task's."""
    scores = {}
    for task, result in scored.items():
        values = result.summary["headline"] or {task: result.summary["metrics"].get(OVERALL)}
        scores |= {f"eval/{name}": value for name, value in values.items() if isinstance(value, float | int)}
        if result.missing:
            scores[f"eval/{task}/without an answer"] = result.missing
    return scores
