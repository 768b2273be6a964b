"""Folders behind a URL, read through fsspec from an in-memory file system."""

import fsspec
import numpy as np
import pytest

from support.hf_folders import tiny, write_folder
from vl3_jax.checkpoint import load, name_map, open_source
from vl3_jax.cli.main import main


@pytest.fixture
def remote(tmp_path):
    tensors = write_folder(tmp_path / "local", "official", tiny(), shards=2)
    filesystem = fsspec.filesystem("memory")
    for file in (tmp_path / "local").iterdir():
        filesystem.pipe_file(f"/bucket/model/{file.name}", file.read_bytes())
    yield "memory://bucket/model", tensors
    filesystem.rm("/bucket", recursive=True)


def test_converts_and_loads_from_a_url(tmp_path, remote):
    url, tensors = remote
    assert main(["convert", "hf", url, str(tmp_path / "o")]) == 0
    source = open_source(tmp_path / "o")
    for name, spec in name_map("official", tiny()).tensors.items():
        np.testing.assert_array_equal(source.slice(spec.leaf, spec.layer).read().result(), spec.to_leaf(tensors[name]))
    assert (source.files / "tokenizer.json").is_file()
    checkpoint = load(url)
    assert (checkpoint.files / "config.json").is_file()


def test_missing_and_unsupported_url(tmp_path, capfd):
    assert main(["convert", "hf", "memory://bucket/nothing", str(tmp_path / "o")]) == 2
    assert "no such folder" in capfd.readouterr().err
    assert main(["convert", "hf", "nonsense://bucket/nothing", str(tmp_path / "o")]) == 2
    assert "nonsense" in capfd.readouterr().err
