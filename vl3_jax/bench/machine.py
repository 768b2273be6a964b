"""Describes the machine of a benchmark run: hardware and package versions."""

import os
import pathlib
import platform
from typing import Any

import jax

from vl3_jax.versions import version

_PACKAGES = ("vl3_jax", "jax", "jaxlib", "libtpu", "flax", "numpy", "torch", "transformers", "av", "pillow")


def machine() -> dict[str, Any]:
    """Returns device, processor and the versions of the packages whose speed is measured."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: installed for name in _PACKAGES if (installed := version(name))},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
