"""The layers of the code: packages import downwards only, and the diagram in the documentation is today's."""

import importlib.util
import pathlib

import pytest

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "generate_layers.py"


@pytest.fixture(scope="module")
def layers():
    spec = importlib.util.spec_from_file_location("generate_layers", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_go_downwards(layers):
    assert layers.violations() == []


def test_an_upward_import_shows(layers, monkeypatch):
    found = layers.imports() | {"model": {"training"}, "drawings": {"model"}}
    monkeypatch.setattr(layers, "imports", lambda: found)
    assert layers.violations() == ["drawings stands in no layer", "model imports training"]


def test_the_diagram_is_current(layers):
    page = layers.PAGE.read_text(encoding="utf-8")
    assert layers.diagram() in page, "run python docs/generate_layers.py"
    assert layers.page() == page
