"""Tests what a decoded token costs on a TPU, by the compiler's estimate: cycles outside the attention kernel."""

import pytest

from support.compiler import needs_compiler
from vl3_jax.inference.programs import STEPS_PER_CALL
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning.hlo import Program
from vl3_jax.planning.plan_serving import Workload, plan_serving
from vl3_jax.planning.program_cost import program_cost

LARGE = 2**20  # bytes of an array, as a layer's weights and cache are
# Millions of cycles a token, of which the weights' bytes take most. A call of several tokens does some things once,
# such as unpacking the masks of constraints.
BUDGETS = [("2b", 8, 5120, None, 6.4), ("2b", 1, 17_408, None, 4.6), ("7b", 8, 5120, "int8", 16.2)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("model", "rows", "slots", "quantize", "million_cycles"), BUDGETS)
def test_decoding_stays_at_the_bandwidth_of_the_memory(model, rows, slots, quantize, million_cycles, tmp_path):
    workload = Workload(rows, prompt=slots - 1024, new=1024, patches=1024)
    plan = plan_serving(model, parse_topology("v5e:1x1"), workload, quantize=quantize, hlo=tmp_path)
    text = (tmp_path / "decode.hlo").read_text()
    cycles = program_cost(text, {r"^jit\(decode_steps\)/while$": STEPS_PER_CALL}).cycles
    cycles_a_token = sum(cycles.values()) / STEPS_PER_CALL
    print(f"{model}, {rows} rows of {slots} slots: {cycles_a_token:,.0f} cycles a token")
    assert plan.fits
    assert cycles_a_token <= million_cycles * 1e6
    # The arguments, which are updated in place, and little else.
    decode = plan.programs["decode"]
    assert decode.temporaries < 0.05 * decode.arguments
    in_layers = 0
    for instructions in Program(text).computations.values():
        for instruction in instructions.values():
            is_copy = instruction.opcode == "copy" and "estimated_cycles" in instruction.attributes
            assert not is_copy or sum(instruction.array_bytes) < LARGE, instruction
            if "/llm._run_layers/" in instruction.op_name:
                in_layers += 1
                assert instruction.opcode != "sort", instruction
    assert in_layers  # what is looked at is there
