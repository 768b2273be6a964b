"""The helpers beside these tests are importable from them."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
