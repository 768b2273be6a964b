"""The small files in a PEFT folder: processor and tokenizer of the run, in place of those of its base.

A PEFT folder has no config.json: with one, transformers would take it for a complete model. The one setting of official
processors that is in config.json stands in processor_config.json there.
"""

import json
import os
import pathlib

from vl3_jax.checkpoint.sidecar_files import CONFIG, IMAGE, PROCESSOR, SIDECAR_FILES, VIDEO, export_sidecar_files
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.json_file import read_object

_COMPRESS = "use_token_compression"


def export_run_files(source: CheckpointSource, layout: str) -> dict[str, bytes]:
    """Returns the files of a run for its PEFT folder.

    Args:
      source: Checkpoint of the run.
      layout: Layout of the base, "official", "official-train" or "native".
    """
    kind = _files_layout(layout)
    files = export_sidecar_files(source.files, source.files_kind, source.config, kind, "float32")
    config = json.loads(files.pop(CONFIG, b"{}"))
    if kind == "official" and _COMPRESS in config:
        processor = json.loads(files.get(PROCESSOR, b"{}")) | {_COMPRESS: config[_COMPRESS]}
        files[PROCESSOR] = json.dumps(processor, indent=2).encode()
    return files


def write_joined_files(run: pathlib.Path, base: CheckpointSource, layout: str, target: pathlib.Path) -> str:
    """Writes the files of a run and, where it has none, those of its base.

    Args:
      run: Folder of the run.
      base: The base model.
      layout: Layout of the names of the run's tensors.
      target: Existing folder to write to.

    Returns:
      The layout of the files.
    """
    kind = _files_layout(layout)
    files = export_sidecar_files(base.files, base.files_kind, base.config, kind, "float32")
    own = {name: (run / name).read_bytes() for name in SIDECAR_FILES if name != CONFIG and (run / name).is_file()}
    if PROCESSOR in own:  # then it has all settings of the processor
        files = {name: content for name, content in files.items() if name not in (IMAGE, VIDEO)}
    for name, content in (files | own).items():
        (target / name).write_bytes(content)
    processor = read_object(target / PROCESSOR)
    if kind == "official" and _COMPRESS in processor:
        config = read_object(target / CONFIG) | {_COMPRESS: processor[_COMPRESS]}
        (target / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False))
    return kind


def has_run_files(run: str | os.PathLike) -> bool:
    """Returns whether a run has processor or tokenizer files of its own."""
    return any((pathlib.Path(run) / name).is_file() for name in SIDECAR_FILES if name != CONFIG)


def _files_layout(layout: str) -> str:
    return "native" if layout == "native" else "official"
