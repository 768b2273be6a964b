"""A compilation cache on disk, so that the second start of a program does not compile again."""

import os
import pathlib


def enable(folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Keeps compiled programs in `folder`, by default `default_folder()`.

    A cache that the user has chosen already (JAX_COMPILATION_CACHE_DIR) is left in place. Returns the folder in use.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir
    if folder is None and chosen:
        return pathlib.Path(chosen)
    folder = pathlib.Path(folder or default_folder())
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def programs_folder() -> pathlib.Path | None:
    """Returns where whole programs are kept with their signatures; None where JAX keeps a cache of its own.

    A program that comes from that cache cannot be written again: on a CPU what is then read does not run.
    """
    import jax

    return None if jax.config.jax_compilation_cache_dir else default_folder() / "programs"


def default_folder() -> pathlib.Path:
    """Returns $XDG_CACHE_HOME/vl3_jax or ~/.cache/vl3_jax."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "vl3_jax"
