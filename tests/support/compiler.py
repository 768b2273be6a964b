"""Marks tests that need the TPU compiler."""

import importlib.util

import pytest

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)
