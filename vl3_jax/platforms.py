"""Which kinds of device this machine has, as far as files and environment tell, before jax is imported."""

import glob
import importlib.metadata
import importlib.util
import os
import pkgutil

_GPU_FILES = ("/dev/nvidia*", "/dev/dxg")  # the latter on Windows, under WSL2
_TPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")
# Set on TPU machines, or by someone who wants the TPU's library started whatever the machine looks like.
_TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "TPU_ACCELERATOR_TYPE", "JAX_FORCE_TPU_INIT")


def on_tpu_machine() -> bool:
    """Whether there are chips that the installed TPU library could use."""
    return importlib.util.find_spec("libtpu") is not None and any(map(glob.glob, _TPU_FILES))


def leave_out_absent_tpu() -> None:
    """Keeps jax from starting the TPU library on a machine without a TPU, where it would print lines of errors.

    The library is installed there for its compiler (`vl3 plan`), which works all the same. JAX_PLATFORMS is set to the
    devices that jax would find by itself, so this must run before jax is imported. Nothing is done where the variable
    is set already, where the library is missing, where there may be a TPU, and where a plugin other than CUDA's is
    installed.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if on_tpu_machine() or any(name in os.environ for name in _TPU_VARIABLES):
        return
    plugins = _plugins()
    if all("cuda" in name for name in plugins):
        # A platform that is named but missing is an error, so CUDA is named only where there is a GPU.
        os.environ["JAX_PLATFORMS"] = "cuda,cpu" if plugins and any(map(glob.glob, _GPU_FILES)) else "cpu"


def _plugins() -> set[str]:
    """Modules that add devices to jax, found the two ways in which jax finds them."""
    found = {entry.value for entry in importlib.metadata.entry_points(group="jax_plugins")}
    namespace = importlib.util.find_spec("jax_plugins")
    if namespace is not None:
        folders = namespace.submodule_search_locations or ()
        found |= {module.name for module in pkgutil.iter_modules(folders)}
    return found
