"""Tests the collectives counted in compiled programs whose communication is known."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vl3_jax.parallel.collectives import Traffic, collectives
from vl3_jax.parallel.mesh import make_mesh

STEPS, WIDTH = 5, 256


def test_loop_bodies_count_as_often_as_they_run():
    """Each iteration gathers a matrix that is split over eight devices."""
    mesh = make_mesh({"fsdp": 8})
    rows = NamedSharding(mesh, PartitionSpec(("fsdp",)))
    layers = NamedSharding(mesh, PartitionSpec(None, ("fsdp",)))

    def body(x, w):
        return jnp.tanh(x @ w), None

    run = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0], in_shardings=(rows, layers), out_shardings=rows)
    x, w = jnp.zeros((4096, WIDTH)), jnp.zeros((STEPS, WIDTH, WIDTH))
    traffic = collectives(run.lower(x, w).compile().as_text())
    assert traffic == {"all-gather": Traffic(STEPS, STEPS * WIDTH * WIDTH * 4)}


def test_a_sum_over_devices():
    mesh = make_mesh({"fsdp": 8})
    rows = NamedSharding(mesh, PartitionSpec(("fsdp",)))
    run = jax.jit(lambda x: x.sum(0), in_shardings=rows, out_shardings=NamedSharding(mesh, PartitionSpec()))
    traffic = collectives(run.lower(jnp.zeros((64, 32))).compile().as_text())
    assert traffic == {"all-reduce": Traffic(1, 32 * 4)}


def test_asynchronous_pairs_and_branches():
    text = """
HloModule m

%branch_a (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}
}

%branch_b (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%p)
}

ENTRY %main (a: bf16[4,8], i: s32[]) -> f32[8] {
  %s = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%a), dimensions={0}
  %d = bf16[32,8]{1,0} all-gather-done(%s)
  ROOT %c = f32[8]{0} conditional(%i, %x, %x), branch_computations={%branch_a, %branch_b}
}
"""
    assert collectives(text) == {"all-gather": Traffic(1, 32 * 8 * 2), "all-reduce": Traffic(1, 32)}
