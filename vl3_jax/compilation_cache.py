"""A compilation cache on disk, so that the second start of a program does not compile again."""

import os
import pathlib


def enable(folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Keeps compiled programs in `folder`, by default $XDG_CACHE_HOME/vl3_jax or ~/.cache/vl3_jax.

    A cache that the user has chosen already (JAX_COMPILATION_CACHE_DIR) is left in place. Returns the folder in use.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    if folder is None and chosen:
        return pathlib.Path(chosen)
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = pathlib.Path(folder or home / "vl3_jax")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
