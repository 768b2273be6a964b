"""Names of TPU slices."""

import pytest

from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import topology


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
    found = topology(name)
    assert (found.name, found.chips) == (compiler, chips)


@pytest.mark.parametrize("name", ["v5e", "v9-8", "v5e:8", "v5p:8x8", "v5e-63", "v5p-9", "", "v5e:0x8"])
def test_mistakes_are_told(name):
    with pytest.raises(InputError, match="topology"):
        topology(name)
