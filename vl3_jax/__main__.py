"""`python -m vl3_jax` is the `vl3` command."""

import sys

from vl3_jax.cli.main import main

sys.exit(main())
