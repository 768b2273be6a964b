"""Initial weights of a training run, and its workdir."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from data_pipelines.mixtures import MixtureConfig
from vl3_jax import config_tree
from vl3_jax.checkpoint import chat_config, load, open_source, open_tokenizer, sidecar_files
from vl3_jax.checkpoint.names import PARTS
from vl3_jax.checkpoint.orbax_tree import ASSETS, MODEL_INFO, model_info
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.model import VideoLLaMA3, init_params, preset
from vl3_jax.model.config import PRESETS, ModelConfig
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.storage.disk_space import translate_write_errors
from vl3_jax.storage.durable import atomic_write
from vl3_jax.storage.locks import LOCK
from vl3_jax.storage.paths import check_bucket, list_dir, resolve, translate_io_errors
from vl3_jax.training.run_config import RUN_CONFIG_FILE, RunConfig, check_same_run

logger = logging.getLogger(__name__)

_VOCABULARY_MULTIPLE = 64  # a random model's embedding has a multiple of so many rows, so that meshes divide them
_SIZES = {
    "vision": ("hidden_size", "intermediate_size", "num_layers", "num_heads"),
    "text": ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
}


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """The weights that a run starts from.

    Attributes:
      model_config: Sizes of the model.
      files: Content of the files beside the weights, by name; tokenizer.json among them.
      source: The checkpoint; None for random weights.
    """

    model_config: ModelConfig
    files: dict[str, bytes]
    source: CheckpointSource | None

    @contextlib.contextmanager
    def local_files(self) -> Iterator[str]:
        """Yields a folder that holds the files for as long as the context is open."""
        with tempfile.TemporaryDirectory(prefix="vl3-files-") as folder:
            for name, content in self.files.items():
                pathlib.Path(folder, name).write_bytes(content)
            yield folder

    def params(self, shardings: Any, seed: int) -> dict[str, Any]:
        """Loads the weights onto their shardings, in their stored types; random ones are made there in float32."""
        if self.source is not None:
            return load(self.source, shardings=shardings, quiet=jax.process_index() > 0).params
        make = jax.jit(init_params, static_argnums=0, out_shardings=shardings)
        return make(VideoLLaMA3(self.model_config), jax.random.key(seed))


def resolve_init(config: RunConfig) -> InitialWeights:
    """Opens `config.init_from`, or prepares random weights where the configuration asks for them.

    Raises:
      InputError: No initial weights, or some of another size; one line.
    """
    if config.init_from:
        return _from_checkpoint(config)
    if not config.random_init:
        raise InputError(
            "no initial weights: give --config.init_from=CHECKPOINT (the workdir of the previous stage, or what "
            "`vl3 convert init` made), or --config.random_init=True"
        )
    return _random(config)


def _from_checkpoint(config: RunConfig) -> InitialWeights:
    source = open_source(config.init_from)
    model_config = chat_config(source)
    _check_size(config, model_config)
    if set(source.parts) < set(PARTS) and not model_config.text.tie_word_embeddings:
        raise InputError(
            f"{config.init_from}: holds only {', '.join(source.parts)}; make a whole model of it: vl3 convert init"
        )
    files = sidecar_files.export_sidecar_files(
        source.files, source.files_kind, model_config, "official", config.param_dtype
    )
    return InitialWeights(model_config, files, source)


def _random(config: RunConfig) -> InitialWeights:
    if not config.tokenizer:
        raise InputError("random weights have no tokenizer: give --config.tokenizer=FOLDER")
    if not config.model:
        raise InputError(f"random weights have no sizes: give --config.model, one of {', '.join(PRESETS)}")
    sizes = preset(config.model)
    with open_tokenizer(config.tokenizer) as path, tempfile.TemporaryDirectory() as folder:
        words = len(Tokenizer.from_folder(path))
        vocab_size = math.ceil(words / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        if not config.mock:
            vocab_size = max(vocab_size, sizes.text.vocab_size)
        sizes = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, vocab_size=vocab_size))
        shutil.copy(path / "tokenizer.json" if path.is_dir() else path, pathlib.Path(folder, "tokenizer.json"))
        files = sidecar_files.export_sidecar_files(pathlib.Path(folder), "qwen2", sizes, "official", config.param_dtype)
    return InitialWeights(sizes, files, None)


def prepare_workdir(workdir: epath.Path, config: RunConfig, init: InitialWeights, rows: int) -> None:
    """Writes the files of the run itself, with which every command can read the checkpoints below the workdir.

    Raises:
      InputError: The run in the workdir began from a model of another configuration.
    """
    if jax.process_index():
        return
    folder = workdir / ASSETS
    parts = [part for part in PARTS if part != "head" or not init.model_config.text.tie_word_embeddings]
    info = model_info(init.model_config, parts, "official")
    with translate_io_errors(workdir):
        before = _readable_json(workdir / MODEL_INFO) if MODEL_INFO in list_dir(workdir) else None
        if before is not None and before != json.loads(info):
            raise InputError(
                f"{workdir}: init_from has another configuration now than its run began from; give the run its start "
                "back, or start another --workdir"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        # Written first: hosts that look later see from it which run the workdir belongs to.
        origin = init.source.origin if init.source is not None else None
        record = {"config": config_tree.to_tree(config), "rows": rows}
        record["origin"] = dataclasses.asdict(origin) if origin is not None else None
        files = {f"{ASSETS}/{name}": file for name, file in _with_data_settings(init.files, config.data).items()}
        record_file = {RUN_CONFIG_FILE: (json.dumps(record, indent=1) + "\n").encode()}
        with translate_write_errors(workdir):
            folder.mkdir(exist_ok=True)
            for name, content in (record_file | files | {MODEL_INFO: info.encode()}).items():
                atomic_write(workdir / name, content)


def read_record(workdir: str | os.PathLike) -> JsonObject:
    """Returns what a workdir says about its run: its `config`, the `rows` of a step, and its `origin`.

    Raises:
      InputError: Not the workdir of a training run.
    """
    folder = resolve(workdir)
    if RUN_CONFIG_FILE not in list_dir(folder):
        raise InputError(f"{workdir}: not the workdir of a training run (no {RUN_CONFIG_FILE}); give that of a run")
    record = read_object(folder / RUN_CONFIG_FILE)
    if not {"config", "rows", "origin"} <= {*record}:
        raise InputError(f"{workdir}: not the workdir of a training run but something else; give that of a run")
    return record


def recorded_rows(workdir: epath.Path, config: RunConfig) -> int | None:
    """Returns the rows of a step of the run that the workdir belongs to; None for a new workdir, or a damaged record.

    Raises:
      InputError: The workdir belongs to another run, holds something else, or cannot be reached.
    """
    check_bucket(workdir)
    names = list_dir(workdir).keys() - {LOCK}
    is_damaged = RUN_CONFIG_FILE not in names or _readable_json(workdir / RUN_CONFIG_FILE) is None
    if MODEL_INFO in names and is_damaged:
        if jax.process_index() == 0:
            logger.warning(
                "warning: %s is missing or damaged; it is written anew from the settings of this command, which cannot "
                "be compared with those that the run began with",
                workdir / RUN_CONFIG_FILE,
            )
        return None
    if RUN_CONFIG_FILE in names:
        with translate_io_errors(workdir):
            record = read_record(workdir)
        check_same_run(workdir, record.section("config"), config)
        return record.integer("rows")
    if set(names) - {f"{RUN_CONFIG_FILE}.partial"}:  # the first file of a run that was killed
        raise InputError(f"{workdir}: holds something that is no training run; give another --workdir")
    return None


def _readable_json(file: epath.Path) -> dict[str, Any] | None:
    """Returns the object in a JSON file of a workdir; None for what a power cut or a disk may leave of it."""
    with contextlib.suppress(ValueError), translate_io_errors(file):
        content = json.loads(file.read_bytes())
        return content if isinstance(content, dict) else None
    return None


def _check_size(config: RunConfig, found: ModelConfig) -> None:
    """Raises InputError where the checkpoint is not of the size that the configuration names."""
    if config.mock or not config.model:
        return
    expected = preset(config.model)
    for part in _SIZES:
        ours, theirs = getattr(expected, part), getattr(found, part)
        for name in _SIZES[part]:
            if getattr(theirs, name) != getattr(ours, name):
                raise InputError(
                    f"{config.init_from}: {part} {name} is {getattr(theirs, name)}, but a {config.model!r} model has "
                    f"{getattr(ours, name)}; give other initial weights, or --config.model= for any size"
                )


def _with_data_settings(files: dict[str, bytes], data: MixtureConfig) -> dict[str, bytes]:
    """Returns the processor's files with the settings of the training data, so that inference processes media alike."""
    changes = {
        "processor_config.json": {
            "image_merge_size": data.image_merge,
            "video_merge_size": data.video_merge,
            "fps": data.fps,
            "max_frames": data.max_frames,
        },
        "preprocessor_config.json": {"min_tokens": data.min_tokens},
        "config.json": {"use_token_compression": data.prune_threshold is not None},
    }
    changed = {name: json.loads(files.get(name, b"{}")) | values for name, values in changes.items()}
    texts = {name: json.dumps(content, indent=2, ensure_ascii=False) for name, content in changed.items()}
    return files | {name: f"{text}\n".encode() for name, text in texts.items()}
