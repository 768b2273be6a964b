"""Makes `sample_datasets` importable: the folder has the name of the package under test, so it cannot be a package."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
