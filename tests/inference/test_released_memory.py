"""Models of the released sizes are asked on a CPU within the memory of their weights, in a process of its own."""

import json
import shutil
import subprocess
import sys

import pytest

from support.released_size import write_released_size
from vl3_jax.host_memory import free_host_memory

GB = 10**9
# Size, type, quantisation, and the most resident memory of the process at any time, mapped files included.
MODELS = {
    "2b-int8": ("2b", "float32", "int8", 3.2),
    "7b-int8": ("7b", "float32", "int8", 10.5),
    "7b-bfloat16": ("7b", "bfloat16", None, 18.5),
}
_DISK = {"2b": 4, "7b": 16.2}  # GB
_ASK = """
import json, pathlib, re, sys
import numpy as np
import vl3_jax as vl3

folder, dtype, quantize = sys.argv[1:4]
model = vl3.load(folder, dtype=dtype, quantize=quantize or None)
image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
answer = model.answer(
    [{"role": "user", "content": [{"type": "image", "image": image}, "What is it?"]}], max_new_tokens=17
)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
print(json.dumps({"peak": peak, "tokens_per_second": answer.tokens_per_second, "seconds": answer.seconds}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Writes each size once, and removes it before the next one."""
    written = {}

    def folder(size):
        if size not in written:
            for other in written.values():
                shutil.rmtree(other)
            written.clear()
            root = tmp_path_factory.mktemp("released")
            if shutil.disk_usage(root).free < 1.2 * _DISK[size] * GB:
                pytest.skip(f"{_DISK[size]} GB of disk are needed")
            written[size] = write_released_size(root / size, size)
        return written[size]

    yield folder
    for path in written.values():
        shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("name", MODELS)
def test_peak_of_asking(folders, tmp_path, name):
    size, dtype, quantize, most = MODELS[name]
    free = free_host_memory()
    if free is not None and free < most * GB:
        pytest.skip(f"{most} GB of memory are needed, {free / GB:.1f} are free")
    command = [sys.executable, "-c", _ASK, str(folders(size)), dtype, quantize or ""]
    environment = {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    print(f"{name}: peak {found['peak'] / GB:.2f} GB, {found['tokens_per_second']:.2f} tokens/s, {found['seconds']}")
    assert found["peak"] <= most * GB
