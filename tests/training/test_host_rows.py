"""Hosts whose rows of a step do not follow each other, as those of TPU slices."""

import os
import subprocess
import sys

import jax
import pytest
from runs import free_port

from support.compiler import needs_compiler
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning.compiler import topology_devices
from vl3_jax.training.data import local_rows

# Arrays of the rows of this process, on a mesh along which the processes' devices take turns.
HOST = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from data_pipelines.loader import Batch
from vl3_jax.parallel.rules import MESH_AXES
from vl3_jax.training.data import local_rows, prefetch_to_device

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
devices = np.array(jax.devices()).reshape(2, 2).T.reshape(1, 4, 1, 1)
mesh, whole = Mesh(devices, MESH_AXES), np.arange(8 * 6, dtype=np.int32).reshape(8, 6)
rows = local_rows(mesh, 8)
arrays = {"tokens": whole[rows], "patches": whole[rows].reshape(4, 1, 2, 3)}
batches = prefetch_to_device([Batch(0, 0, arrays, whole, {})] * 3, mesh, 8)
for batch in batches:
    for array in batch.arrays.values():
        found = multihost_utils.process_allgather(array, tiled=True)
        np.testing.assert_array_equal(found.reshape(8, 6), whole)
print(rows)
"""


@needs_compiler
def test_a_host_of_a_slice_has_a_block_of_its_torus():
    mesh = make_mesh({"fsdp": -1}, topology_devices(parse_topology("v5e:4x4")))
    assert local_rows(mesh, 16) == [0, 1, 4, 5]
    assert local_rows(mesh, 32) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert {device.process_index for device in mesh.devices.flat[[0, 1, 4, 5]]} == {jax.process_index()}


@pytest.mark.slow
def test_each_host_brings_its_own_rows():
    address = f"127.0.0.1:{free_port()}"
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(index)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    assert [host.communicate(timeout=120)[0].splitlines()[-1] for host in hosts] == ["[0, 1, 4, 5]", "[2, 3, 6, 7]"]
    assert [host.returncode for host in hosts] == [0, 0]
