"""Runs the scripts of `launch/` from the command line."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"


def launched(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script from the root of the repository and waits for it; `environment` is added to ours."""
    command = [sys.executable] if script.endswith(".py") else ["bash"]
    return subprocess.run(
        [*command, str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
