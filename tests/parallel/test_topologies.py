"""Tests the names of TPU topologies and the meshes of their chips."""

import pytest

from support.compiler import needs_compiler
from vl3_jax.errors import InputError
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import compiler, search


@pytest.mark.parametrize(
    ("name", "slice_name", "chips"),
    [
        ("v5e:8x8", "v5e:8x8", 64),
        ("v5litepod-64", "v5e:8x8", 64),
        ("v5e-16", "v5e:4x4", 16),
        ("V6E-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p:2x2x4", "v5p:2x2x4", 16),
        ("v4-32", "v4:2x2x4", 16),
    ],
)
def test_names(name, slice_name, chips):
    topology = parse_topology(name)
    assert (topology.name, topology.chips) == (slice_name, chips)


@pytest.mark.parametrize("name", ["v5e", "v9-8", "v5e:8", "v5p:8x8", "v5e-63", "v5p-9", "", "v5e:0x8"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="topology"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "larger"), [("v5e:4x4", "v5e:4x8"), ("v5e:4x8", "v5e:8x8"), ("v5p:2x2x1", "v5p:2x2x2")]
)
def test_doubled_topology(name, larger):
    assert parse_topology(name).doubled().name == larger


@pytest.mark.parametrize("name", ["v5e-256", "v5p:8x8x8"])
def test_the_largest_slice_cannot_be_doubled(name):
    assert parse_topology(name).doubled() is None


def test_several_slices():
    assert parse_topology("v5e:4x4", 3).chips == 48
    with pytest.raises(InputError, match="0 slices"):
        parse_topology("v5e:4x4", 0)


@needs_compiler
class TestChips:
    """Tests the chips as the TPU compiler describes them."""

    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v5e:1x1", "v6e:2x4"])
    def test_one_device_per_chip(self, name):
        assert len(compiler.topology_devices(parse_topology(name))) == parse_topology(name).chips

    @pytest.mark.parametrize(("name", "slices"), [("v5e:4x4", 1), ("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 2)])
    def test_mesh_axes_are_independent_of_the_shape_of_a_slice(self, name, slices):
        topology = parse_topology(name, slices)
        chips = compiler.topology_devices(topology)
        for sizes in search.meshes(topology):
            mesh = make_mesh(sizes, chips)
            assert dict(mesh.shape) == sizes
            assert len(set(mesh.devices.flat)) == topology.chips
            for group in mesh.devices.reshape(-1, sizes["tensor"] * sizes["context"]):
                hops = sum(abs(a - b) for a, b in zip(group[0].coords, group[-1].coords, strict=True))
                assert hops == len(group) - 1, "chips that share a row are neighbours"

    def test_only_data_parallelism_crosses_slices(self):
        chips = compiler.topology_devices(parse_topology("v5e:2x2", 2))
        mesh = make_mesh({"data": 4, "fsdp": 2}, chips)
        slices = [{chip.slice_index for chip in replica.flat} for replica in mesh.devices]
        assert slices == [{0}, {0}, {1}, {1}]
        with pytest.raises(InputError, match=r"mesh\.data is 1, make it a multiple of 2"):
            make_mesh({"fsdp": 8}, chips)
