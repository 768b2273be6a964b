"""Tests the Colab notebook from top to bottom on the CPU, with a tiny checkpoint."""

import importlib.metadata
import pathlib

import pytest

from support.checkpoints import DATA, write_random_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch" / "colab" / "vl3_inference.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_with_one_cell_changed(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    settings = {
        "MODEL": str(write_random_checkpoint(tmp_path / "tiny")),
        "PROJECT": str(ROOT),
        "IMAGE": str(DATA / "media" / "images" / "handwriting.png"),
        "VIDEO": str(DATA / "media" / "edge" / "city_vp9.webm"),
        "DTYPE": None,
        "MAX_VISUAL_TOKENS": 300,
        "MAX_NEW_TOKENS": 8,
    }
    assert all(f"{name} = " in cells["settings"].source for name in settings)
    cells["settings"].source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    # Only a dry run of the installation: the package under test is installed already.
    offline = '"install", "--dry-run", "--no-deps", "--no-build-isolation", '
    cells["install"].source = cells["install"].source.replace('"install", ', offline)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()

    def printed(tag: str) -> str:
        return "".join(output.get("text", "") for output in cells[tag].outputs)

    assert f"kept jax=={importlib.metadata.version('jax')} " in printed("install")
    assert "weights" in printed("plan")
    assert "GiB" in printed("plan")
    assert printed("image").strip()
    assert "vision tokens kept" in printed("video")
    assert "'decode'" in printed("again")
