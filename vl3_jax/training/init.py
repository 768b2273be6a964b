"""What a run begins from: weights, sizes, and the small files that go with them; and its workdir."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from vl3_jax.checkpoint import load_source, open_source, sidecar_files
from vl3_jax.checkpoint.names import PARTS
from vl3_jax.checkpoint.orbax_tree import ASSETS, MODEL_INFO, model_info
from vl3_jax.checkpoint.paths import check_bucket, list_dir, translate_io_errors
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, init_params, preset
from vl3_jax.model.config import ModelConfig
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.training.run_config import RECORD, check_same_run, record

_VOCABULARY_MULTIPLE = 64  # rows of the embedding of a random model, so that meshes divide them
_SIZES = {
    "vision": ("hidden_size", "intermediate_size", "num_layers", "num_heads"),
    "text": ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
}


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Where weights come from.

    Attributes:
      model: sizes.
      files: what lies beside the weights, by name; tokenizer.json among them.
      source: the checkpoint; None for random weights.
    """

    model: ModelConfig
    files: dict[str, bytes]
    source: CheckpointSource | None

    @contextlib.contextmanager
    def local_files(self) -> Iterator[str]:
        """A folder with the files, tokenizer.json among them, for as long as the context is open."""
        with tempfile.TemporaryDirectory(prefix="vl3-files-") as folder:
            for name, content in self.files.items():
                pathlib.Path(folder, name).write_bytes(content)
            yield folder

    def params(self, shardings: Any, seed: int) -> dict[str, Any]:
        """The weights, on their shardings, as stored; random ones in float32."""
        if self.source is not None:
            return load_source(self.source, shardings=shardings, quiet=jax.process_index() > 0).params
        make = jax.jit(init_params, static_argnums=0, out_shardings=shardings)
        return make(VideoLLaMA3(self.model), jax.random.key(seed))


def resolve_init(config: ConfigDict) -> InitialWeights:
    """Opens `config.init_from`, or prepares random weights where the configuration asks for them.

    Raises:
      InputError: no start, or one of another size; one line.
    """
    if config.init_from:
        source = open_source(config.init_from)
        _check_size(config, source.config)
        if set(source.parts) < set(PARTS) and not source.config.text.tie_word_embeddings:
            raise InputError(
                f"{config.init_from}: holds only {', '.join(source.parts)}; make a start of it: vl3 convert init"
            )
        files = sidecar_files.export_sidecar_files(
            source.files, source.files_kind, source.config, "official", config.param_dtype
        )
        return InitialWeights(source.config, files, source)
    if not config.random_init:
        raise InputError(
            "no start: give --config.init_from=CHECKPOINT (the workdir of the stage before, or what `vl3 convert init` "
            "made), or --config.random_init=True"
        )
    if not config.tokenizer:
        raise InputError("a random start has no tokenizer: give --config.tokenizer=FOLDER")
    count = len(Tokenizer.from_folder(config.tokenizer))
    sizes = preset(config.model)
    vocabulary = max(
        -(-count // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE, 0 if config.mock else sizes.text.vocab_size
    )
    sizes = dataclasses.replace(sizes, text=dataclasses.replace(sizes.text, vocab_size=vocabulary))
    path = pathlib.Path(config.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path / "tokenizer.json" if path.is_dir() else path, pathlib.Path(folder, "tokenizer.json"))
        files = sidecar_files.export_sidecar_files(pathlib.Path(folder), "qwen2", sizes, "official", config.param_dtype)
    return InitialWeights(sizes, files, None)


def prepare_workdir(workdir: epath.Path, config: ConfigDict, begin: InitialWeights, rows: int) -> None:
    """Writes what belongs to the run, once; every command then reads the checkpoints below it."""
    if jax.process_index():
        return
    folder = workdir / ASSETS
    parts = [part for part in PARTS if part != "head" or not begin.model.text.tie_word_embeddings]
    with translate_io_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        # First, for hosts that only now look whose workdir this is.
        (workdir / RECORD).write_text(json.dumps(record(config, rows), indent=1) + "\n")
        folder.mkdir(exist_ok=True)
        for name, content in _as_trained(begin.files, config).items():
            (folder / name).write_bytes(content)
        (workdir / MODEL_INFO).write_text(model_info(begin.model, parts, "official"))


def recorded_rows(workdir: epath.Path, config: ConfigDict) -> int | None:
    """The rows of a step of the run that the workdir belongs to; None for a new workdir.

    Raises:
      InputError: the workdir is of another run, holds something else, or is out of reach.
    """
    check_bucket(workdir)
    path, names = workdir / RECORD, list_dir(workdir)
    if RECORD in names:
        try:
            with translate_io_errors(workdir):
                found = json.loads(path.read_text())
            check_same_run(workdir, found, config)
            return found["rows"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: not the record of a run; give another --workdir") from None
    if names:
        raise InputError(f"{workdir}: holds something that is no training run; give another --workdir")
    return None


def _check_size(config: ConfigDict, found: ModelConfig) -> None:
    """Whether the start is of the size that the configuration is for."""
    expected = preset(config.model)
    for part in () if config.mock else ("vision", "text"):
        ours, theirs = getattr(expected, part), getattr(found, part)
        for name in _SIZES[part]:
            if getattr(theirs, name) != getattr(ours, name):
                raise InputError(
                    f"{config.init_from}: {part} {name} is {getattr(theirs, name)}, but a {config.model!r} model has "
                    f"{getattr(ours, name)}; give another start, or --config.model"
                )


def _as_trained(files: dict[str, bytes], config: ConfigDict) -> dict[str, bytes]:
    """The processor's settings are those of the training data, so that questions are asked as answers were learned."""
    data = config.data
    settings = {
        "image_merge_size": data.image_merge,
        "video_merge_size": data.video_merge,
        "fps": data.fps,
        "max_frames": data.max_frames,
    }
    changes = {
        "processor_config.json": settings,
        "preprocessor_config.json": {"min_tokens": data.min_tokens},
        "config.json": {"use_token_compression": bool(data.prune_threshold)},
    }
    changed = dict(files)
    for name, values in changes.items():
        content = json.loads(files.get(name, b"{}")) | values
        changed[name] = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    return changed
