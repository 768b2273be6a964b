"""Tests the cost read from compiled programs whose loops and communication are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from support.compiler import needs_compiler
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import compiler
from vl3_jax.planning.hlo import Program
from vl3_jax.planning.program_cost import Traffic, program_cost

STEPS, WIDTH = 5, 256


def gathering_scan(mesh, dtype):
    """Lowers a loop of which each iteration gathers a matrix that is split over the mesh."""
    rows = NamedSharding(mesh, PartitionSpec(("fsdp",)))
    layers = NamedSharding(mesh, PartitionSpec(None, ("fsdp",)))

    def body(x, w):
        return jnp.tanh(x @ w), None

    run = jax.jit(lambda x, w: jax.lax.scan(body, x, w)[0], in_shardings=(rows, layers), out_shardings=rows)
    shapes = ((4096, WIDTH), (STEPS, WIDTH, WIDTH))
    return run.lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))


def test_loop_bodies_count_as_often_as_they_run():
    cost = program_cost(gathering_scan(make_mesh({"fsdp": 8}), jnp.float32).compile().as_text())
    assert cost.collectives == {"all-gather": Traffic(STEPS, STEPS * WIDTH * WIDTH * 4)}


@needs_compiler
def test_loops_of_the_tpu_compiler_are_counted_by_their_conditions():
    """Its text holds no number of iterations, and cuts an asynchronous collective into fragments."""
    devices = compiler.topology_devices(parse_topology("v5e:2x2"))
    analysis = compiler.compile_and_analyze(gathering_scan(make_mesh({"fsdp": 4}, devices), jnp.bfloat16))
    assert analysis.cost.collectives == {"all-gather": Traffic(STEPS, STEPS * WIDTH * WIDTH * 2)}
    assert analysis.cost.windowed_products == 0
    assert analysis.cost.cycles["rest"] > 0


def test_a_sum_over_devices_passes_twice():
    mesh = make_mesh({"fsdp": 8})
    rows = NamedSharding(mesh, PartitionSpec(("fsdp",)))
    run = jax.jit(lambda x: x.sum(0), in_shardings=rows, out_shardings=NamedSharding(mesh, PartitionSpec()))
    cost = program_cost(run.lower(jnp.zeros((64, 32))).compile().as_text())
    assert cost.collectives == {"all-reduce": Traffic(1, 2 * 32 * 4)}
    assert cost.synchronous_bytes == 2 * 32 * 4


BRANCHES = """
HloModule m

%branch_a (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}
}

%branch_b (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%q)
}

%all-reduce-scatter.1 (s: f32[64]) -> f32[8] {
  %s = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%s), replica_groups={}
  ROOT %piece = f32[8]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={8}
}

ENTRY %main (a: bf16[4,8], i: s32[], g: f32[64]) -> f32[8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %g = f32[64]{0} parameter(2)
  %s.2 = (bf16[4,8]{1,0}, bf16[32,8]{1,0}, u32[]{:S(2)}) all-gather-start(%a), dimensions={0}
  %d = bf16[32,8]{1,0} all-gather-done(%s.2)
  %f = f32[8]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %e = f32[8]{0} conditional(%i, %x, %x), branch_computations={%branch_a, %branch_b}
}
"""


def test_asynchronous_pairs_branches_and_scatters():
    cost = program_cost(BRANCHES)
    assert cost.collectives == {
        "all-gather": Traffic(1, 32 * 8 * 2),
        "all-reduce": Traffic(1, 2 * 32),
        "reduce-scatter": Traffic(1, 64 * 4),
    }
    assert cost.synchronous_bytes == 2 * 32 + 64 * 4


LOOPS = """
HloModule m

%chain.1 (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, frontend_attributes={chain_id="1"}
  ROOT %start = bf16[8,8]{1,0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%chain.2 (p.2: bf16[2,8]) -> bf16[8,8] {
  %p.2 = bf16[2,8]{1,0} parameter(0)
  %gather.2 = bf16[8,8]{1,0} all-gather(%p.2), channel_id=7, frontend_attributes={chain_id="1"}
  ROOT %done = bf16[8,8]{1,0} custom-call(%p.2, %gather.2), custom_call_target="AsyncCollectiveDone"
}

%condition (state: (u32[], s32[], u32[])) -> pred[] {
  %state = (u32[], s32[], u32[]) parameter(0)
  %counter = u32[] get-tuple-element(%state), index=0
  %limit = LIMIT
  ROOT %less = pred[] compare(%counter, %limit), direction=LT
}

%body (state.2: (u32[], s32[], u32[])) -> (u32[], s32[], u32[]) {
  %state.2 = (u32[], s32[], u32[]) parameter(0)
  %counter.2 = u32[] get-tuple-element(%state.2), index=0
  %two = u32[] constant(2)
  %next = u32[]{:T(128)} add(%counter.2, %two)
  %work = bf16[8,8]{1,0} fusion(), calls=%chain.1, metadata={op_name="PATH"}, "estimated_cycles":"100"
  %more = bf16[8,8]{1,0} fusion(), calls=%chain.2, "estimated_cycles":"10"
  %moved = bf16[8,8]{1,0} custom-call(), "cost_estimate":{"flops":"0","bytes_accessed":"64"}
  %same = s32[] get-tuple-element(%state.2), index=1
  %bound = u32[] get-tuple-element(%state.2), index=2
  ROOT %new = (u32[], s32[], u32[]) tuple(%next, %same, %bound)
}

ENTRY %main (n: u32[]) -> (u32[], s32[], u32[]) {
  %n = u32[] parameter(0)
  %one = u32[] constant(1)
  %ten = BOUND
  %zero = s32[] constant(0)
  %start.2 = (u32[], s32[], u32[]) tuple(%one, %zero, %ten)
  ROOT %loop = (u32[], s32[], u32[]) while(%start.2), condition=%condition, body=%body, op_name="(loss)/while"
}
"""
PATH = "jit(step)/jvp(encode)/VideoLLaMA3.encode/vision/while/body/closed_call/layers/mlp/fc1/dot_general"
CONSTANT, STATE = "u32[] constant(10)", "u32[] get-tuple-element(%state), index=2"


@pytest.mark.parametrize(
    ("limit", "bound", "trips"),
    [
        (CONSTANT, CONSTANT, 5),  # 1, 3, 5, 7, 9
        (STATE, CONSTANT, 5),
        (STATE, "u32[] copy(%n)", 3),  # depends on data: what the caller says
    ],
)
@pytest.mark.parametrize("layers", ["layers", "VisionLayer"])
def test_loops_chains_and_scopes(limit, bound, trips, layers):
    text = LOOPS.replace("LIMIT", limit).replace("BOUND", bound).replace("PATH", PATH.replace("layers", layers))
    cost = program_cost(text, {r"loss\)/while$": 3})
    assert Program(text).runs({r"loss\)/while$": 3})["body"] == trips
    assert cost.collectives == {"all-gather": Traffic(trips, trips * 8 * 8 * 2)}
    assert cost.synchronous_bytes == 0
    assert cost.kernel_bytes == 64 * trips
    assert {scope: cycles for scope, cycles in cost.cycles.items() if cycles} == {
        "tower mlp": 100 * trips,
        "loss": 10 * trips,
    }
