"""Makes `corpora` importable: the folder bears the name of the package under test, so it cannot be one itself."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
