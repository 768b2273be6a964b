"""What programs will cost on TPUs that are not there: `vl3 plan`.

Importing it before jax leaves the accelerators of this machine alone.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Off the cloud the compiler must not look for a TPU machine around it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
