"""Names of TPU slices."""

import pytest

from support.compiler import needs_compiler
from vl3_jax.errors import InputError
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import compiler, search


@pytest.mark.parametrize(
    ("name", "compiler", "chips"),
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
def test_names(name, compiler, chips):
    found = parse_topology(name)
    assert (found.name, found.chips) == (compiler, chips)


@pytest.mark.parametrize("name", ["v5e", "v9-8", "v5e:8", "v5p:8x8", "v5e-63", "v5p-9", "", "v5e:0x8"])
def test_mistakes_are_told(name):
    with pytest.raises(InputError, match="topology"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "larger"), [("v5e:4x4", "v5e:4x8"), ("v5e:4x8", "v5e:8x8"), ("v5p:2x2x1", "v5p:2x2x2")]
)
def test_twice_as_large(name, larger):
    assert parse_topology(name).doubled().name == larger


@pytest.mark.parametrize("name", ["v5e-256", "v5p:8x8x8"])
def test_the_largest_slice(name):
    assert parse_topology(name).doubled() is None


def test_several_slices():
    assert parse_topology("v5e:4x4", 3).chips == 48
    with pytest.raises(InputError, match="0 slices"):
        parse_topology("v5e:4x4", 0)


@needs_compiler
class TestChips:
    """As the TPU compiler describes them."""

    @pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v5e:1x1", "v6e:2x4"])
    def test_one_device_a_chip(self, name):
        assert len(compiler.topology_devices(parse_topology(name))) == parse_topology(name).chips

    @pytest.mark.parametrize(("name", "slices"), [("v5e:4x4", 1), ("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 2)])
    def test_meshes_need_not_follow_the_shape_of_a_slice(self, name, slices):
        topology = parse_topology(name, slices)
        chips = compiler.topology_devices(topology)
        for sizes in search.meshes(topology):
            mesh = make_mesh(sizes, chips)
            assert dict(mesh.shape) == sizes
            assert len(set(mesh.devices.flat)) == topology.chips
            for pair in mesh.devices.reshape(-1, sizes["tensor"] * sizes["context"]):
                one, other = pair[0], pair[-1]
                hops = sum(abs(here - there) for here, there in zip(one.coords, other.coords, strict=True))
                assert hops == len(pair) - 1, "chips that share a row are neighbours"

    def test_only_copies_of_the_weights_meet_between_slices(self):
        chips = compiler.topology_devices(parse_topology("v5e:2x2", 2))
        mesh = make_mesh({"data": 4, "fsdp": 2}, chips)
        slices = [{chip.slice_index for chip in copy.flat} for copy in mesh.devices]
        assert slices == [{0}, {0}, {1}, {1}]
        with pytest.raises(InputError, match=r"mesh\.data is 1, make it a multiple of 2"):
            make_mesh({"fsdp": 8}, chips)
