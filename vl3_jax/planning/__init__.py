"""Ahead-of-time compilation for TPU topologies: `vl3 plan`.

Imported before jax, the package keeps jax from using the accelerators of this machine.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Off the cloud the compiler must not look for a TPU machine around it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
